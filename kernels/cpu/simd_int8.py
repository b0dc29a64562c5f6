"""Exact int8 dot products: sixteen rows at a time, for a few tokens, on any target.

``Counts`` is sixteen int32 for each of a few tokens. A dot product (``simd_dots``) multiplies unsigned weights (``simd_weights``)
by signed activations and adds to the counts, which start at the correction for the weights' offset.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from ..numerics import GROUP, INFINITY_BITS, TINY, UNFIXED
from . import simd_dots, target
from .simd import (
    _F32,
    _I8,
    _I32,
    _I64,
    _V32,
    _VF,
    LANES,
    _constant,
    _declare,
    _element,
    _fma,
    _loop,
    _pointer,
    _splat,
    _vector_at,
    vector,
)
from .simd_dots import BYTES, _joined, _vectors
from .simd_weights import (
    PAIR_ORDER,
    STEPS,
    bytes64,
    factors_or_indices,
    scaled_factors,
    step_weights,
    table_type,
    table_vectors,
)

UNIT = 8                        # groups whose activations lie together


class Counts(types.Type):
    """``vectors`` of sixteen int32: for each token of a ``Tile`` one for each of its ``tiles``."""

    def __init__(self, tokens: int, tiles: int = 1):
        self.tokens, self.tiles, self.vectors = tokens, tiles, tokens * tiles
        super().__init__(name=f"counts({tokens}, {tiles})")


@register_model(Counts)
class _CountsModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_V32, fe_type.vectors))


def _splat32(builder, scalar):
    undefined = ir.Constant(_V32, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_V32, 0))


@intrinsic
def counts_start(typing_context, kind, tile, corrections, offset, stride):
    """Counts for the tokens of ``tile``: what makes up for the weights' offset.

    That is corrections[offset + t * stride] in every lane, -128 * the sum of x; nothing where weights are multiplied as signed.
    """
    counts = Counts(tile.tokens, tile.tiles)
    def codegen(context, builder, signature, arguments):
        _, _, array, offset, stride = arguments
        if simd_dots.best(kind.nibbles).signed:
            return ir.Constant(context.get_value_type(counts), [[0] * LANES] * tile.vectors)
        result = ir.Constant(context.get_value_type(counts), ir.Undefined)
        for t in range(counts.tokens):
            start = builder.load(_element(context, builder, corrections, array, offset, stride, t))
            start = builder.ashr(start, ir.Constant(_I32, kind.shift)) if kind.shift else start
            start = _splat32(builder, start)
            for v in range(t * counts.tiles, (t + 1) * counts.tiles):
                result = builder.insert_value(result, start, v)
        return result
    return counts(kind, tile, corrections, types.intp, types.intp), codegen


@intrinsic
def dots(typing_context, kind, counts, raw, apart, half, table, x, offset, stride):
    """counts of token t += the dot products of a group of 16 or 32 rows with the 32 int8 at x[offset + t * stride].

    ``half``, a literal, chooses the group of the pair; ``apart``: bytes from the weights of one tile to those of the other.
    """
    if not isinstance(half, types.IntegerLiteral):
        return None
    group = half.literal_value
    def codegen(context, builder, signature, arguments):
        _, result, raw, apart, _, table, values, offset, stride = arguments
        chosen, method = table_vectors(builder, table), simd_dots.best(kind.nibbles)
        raws = [raw, builder.gep(raw, [apart])][: counts.tiles]
        starts = [_vectors(builder, builder.extract_value(result, v), _V32, method.parts) for v in range(counts.vectors)]
        def two_steps(number, sums):
            sums = list(sums)
            for odd in range(2):
                at = builder.add(offset, builder.add(builder.mul(number, ir.Constant(_I64, 8)), ir.Constant(_I64, 4 * odd)))
                parts = [part for raw in raws for part in step_weights(builder, kind, raw, chosen, group, number, odd, method)]
                weights = [method.weights(builder, part) for part in parts]
                for t in range(counts.tokens):
                    four = method.activations(builder, _four(context, builder, x, values, at, stride, t))
                    for i, weight in enumerate(weights, t * len(weights)):
                        sums[i] = method.step(builder, sums[i], weight, four)
            return sums
        sums = [method.start(builder, part) for parts in starts for part in parts]
        if method.parts == 1:
            for number in range(STEPS // 2):
                sums = two_steps(ir.Constant(_I64, number), sums)
        else:
            # With few registers, a loop: LLVM would order straight code so that it spills.
            sums = _loop(builder, ir.Constant(_I64, STEPS // 2), sums, two_steps)
        for v in range(counts.vectors):
            own = sums[v * method.parts : (v + 1) * method.parts]
            parts = [method.finish(builder, *pair) for pair in zip(starts[v], own, strict=True)]
            result = builder.insert_value(result, _joined(builder, parts), v)
        return result
    return counts(kind, counts, raw, types.intp, half, table_type, x, types.intp, types.intp), codegen


def _four(context, builder, x, values, offset, stride, token):
    """The four bytes at x[offset + token * stride], as an int32."""
    pointer = _element(context, builder, x, values, offset, stride, token)
    four = builder.load(builder.bitcast(pointer, _I32.as_pointer()))
    four.align = 4
    return four


@intrinsic
def tile_fma_indexed(typing_context, kind, tile, counts, first, second, half, scales, offset, stride):
    """tile[t] = fma(float32(counts[t]), factors * scales[offset + t * stride], tile[t]) for every token t.

    ``first``, ``second``: lines of factors of the first and the second sixteen rows; ``half``, a literal, chooses the group of
    the pair. Indices choose among the sixteen products of factors and scale: a permutation takes no multiplier's time.
    """
    if not isinstance(half, types.IntegerLiteral):
        return None
    group = half.literal_value
    def codegen(context, builder, signature, arguments):
        _, result, counts, *lines, _, values, offset, stride = arguments
        chosen = [factors_or_indices(builder, kind, line, group) for line in lines[: tile.tiles]]
        for t in range(tile.tokens):
            scale = _splat(builder, builder.load(_element(context, builder, scales, values, offset, stride, t)))
            products = scaled_factors(builder, kind, scale, chosen)
            for v, product in enumerate(products, t * tile.tiles):
                dots = builder.sitofp(builder.extract_value(counts, v), _VF)
                chain = _fma(builder, dots, product, builder.extract_value(result, v))
                result = builder.insert_value(result, chain, v)
        return result
    return tile(kind, tile, counts, bytes64, bytes64, half, scales, types.intp, types.intp), codegen


@intrinsic
def tile_fma_counts(typing_context, tile, counts, first, second, scales, offset, stride):
    """tile[t] = fma(float32(counts[t]), factors * scales[offset + t * stride], tile[t]) for every token t.

    ``first``, ``second``: factors of the first and, if the tile has one, the second sixteen rows.
    """
    def codegen(context, builder, signature, arguments):
        result, counts, *factors, values, offset, stride = arguments
        for t in range(tile.tokens):
            scalar = _splat(builder, builder.load(_element(context, builder, scales, values, offset, stride, t)))
            for v, factor in enumerate(factors[: tile.tiles], t * tile.tiles):
                dots = builder.sitofp(builder.extract_value(counts, v), _VF)
                chain = _fma(builder, dots, builder.fmul(factor, scalar), builder.extract_value(result, v))
                result = builder.insert_value(result, chain, v)
        return result
    return tile(tile, counts, vector, vector, scales, types.intp, types.intp), codegen


@intrinsic
def quantize_32(typing_context, values, source, x, scales, corrections, at):
    """Quantises the 32 float32 from values[source] on as group ``at``; returns whether all were finite.

    x[32 at …] = rint(value * (127 / amax)) in ``PAIR_ORDER``, scales[at] = amax / 127, both zero where amax is below 2**-100, and
    corrections[at] = -128 * the sum of x.
    """
    def codegen(context, builder, signature, arguments):
        values_, source, x_, scales_, corrections_, at = arguments
        def plain(number):
            return ir.Constant(_F32, number)
        parts = [_vector_at(builder, _pointer(context, builder, values, values_,
                                              builder.add(source, ir.Constant(_I64, part * LANES))), _VF, 4) for part in range(2)]
        sizes = [builder.and_(builder.bitcast(part, _V32), _constant(_V32, 0x7FFFFFFF)) for part in parts]
        both = builder.call(_declare(builder, "llvm.umax.v16i32", _V32, [_V32, _V32]), sizes)
        largest = builder.call(_declare(builder, "llvm.vector.reduce.umax.v16i32", _I32, [_V32]), [both])
        amax = builder.bitcast(largest, _F32)
        small = builder.fcmp_ordered("<", amax, plain(float(TINY)))
        inverse = builder.select(small, plain(0.0), builder.fdiv(plain(127.0), amax))
        whole = []
        for part in parts:
            scaled = builder.fmul(part, _splat(builder, inverse))
            whole.append(builder.fptosi(builder.call(_declare(builder, "llvm.rint.v16f32", _VF, [_VF]), [scaled]), _V32))
        total = builder.call(_declare(builder, "llvm.vector.reduce.add.v16i32", _I32, [_V32]), [builder.add(*whole)])
        order = ir.Constant(ir.VectorType(_I32, GROUP), [i // 8 * 8 + PAIR_ORDER[i % 8] for i in range(GROUP)])
        mixed = builder.shuffle_vector(*(builder.trunc(part, ir.VectorType(_I8, LANES)) for part in whole), order)
        place = _pointer(context, builder, x, x_, builder.mul(at, ir.Constant(_I64, GROUP)))
        builder.store(mixed, builder.bitcast(place, mixed.type.as_pointer())).align = GROUP
        scale = builder.select(small, plain(0.0), builder.fdiv(amax, plain(127.0)))
        builder.store(scale, _pointer(context, builder, scales, scales_, at))
        correction = builder.mul(total, ir.Constant(_I32, -128))
        builder.store(correction, _pointer(context, builder, corrections, corrections_, at))
        return builder.icmp_unsigned("<", largest, ir.Constant(_I32, INFINITY_BITS))
    return types.boolean(values, types.intp, x, scales, corrections, types.intp), codegen


@intrinsic
def no_bits(typing_context):
    """Sixteen zeros, the start of ``tile_add_totals``."""
    bits = Counts(1)
    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(bits), [[0] * LANES])
    return bits(), codegen


def _rounded(builder, eight):
    """int64 x 8, half to even."""
    wide = ir.VectorType(_I64, LANES // 2)
    if target.vector_bits() == 512:
        convert = _declare(builder, "llvm.x86.avx512.mask.cvtps2qq.512", wide, [eight.type, wide, _I8, _I32])
        return builder.call(convert, [eight, ir.Constant(wide, [0] * 8), ir.Constant(_I8, -1), ir.Constant(_I32, 4)])
    # Added to a float64 of absolute value below 2**51, 1.5 * 2**52 leaves its nearest whole number in the lowest bits.
    double = ir.VectorType(ir.DoubleType(), LANES // 2)
    shifted = builder.fadd(builder.fpext(eight, double), ir.Constant(double, [1.5 * 2.0**52] * double.count))
    return builder.sub(builder.bitcast(shifted, wide), ir.Constant(wide, [0x4338 << 48] * wide.count))


@intrinsic
def tile_add_totals(typing_context, tile, first, second, totals, offset, stride, largest):
    """totals[offset + t * stride …+ 16, or + 32] (int64) += rint(tile[t] * scales) for every token t.

    ``first``, ``second``: row scales of the first and, if the tile has one, the second sixteen rows, times 2**32: a power of two
    commutes with rounding. Returns ``largest``, in each lane the highest absolute bit pattern of the products, raised by these;
    a product out of range adds anything.
    """
    def codegen(context, builder, signature, arguments):
        values, *scales, array, offset, stride, largest = arguments
        wide, bits = ir.VectorType(_I64, LANES // 2), builder.extract_value(largest, 0)
        highest = _declare(builder, "llvm.umax.v16i32", _V32, [_V32, _V32])
        for v in range(tile.vectors):
            t, place = divmod(v, tile.tiles)
            product = builder.fmul(builder.extract_value(values, v), scales[place])
            bits = builder.call(highest, [bits, builder.and_(builder.bitcast(product, _V32), _constant(_V32, 0x7FFFFFFF))])
            for part, eight in enumerate(_vectors(builder, product, _VF, 2)):
                index = builder.add(offset, ir.Constant(offset.type, place * LANES + part * LANES // 2))
                address = builder.bitcast(_element(context, builder, totals, array, index, stride, t), wide.as_pointer())
                old = builder.load(address)
                old.align = BYTES
                builder.store(builder.add(old, _rounded(builder, eight)), address).align = BYTES
        return builder.insert_value(largest, bits, 0)
    return largest(tile, vector, vector, totals, types.intp, types.intp, largest), codegen


@intrinsic
def finished(typing_context, totals, index):
    """Sixteen int64 multiples of 2**-32 from totals[index] on as float32: rounded to float64, then to float32."""
    def codegen(context, builder, signature, arguments):
        double, eight = ir.VectorType(ir.DoubleType(), 8), ir.VectorType(_F32, 8)
        parts = []
        for part in range(2):
            at = builder.add(arguments[1], ir.Constant(_I64, 8 * part))
            whole = _vector_at(builder, _pointer(context, builder, totals, arguments[0], at), ir.VectorType(_I64, 8), 8)
            scaled = builder.fmul(builder.sitofp(whole, double), ir.Constant(double, [UNFIXED] * 8))
            parts.append(builder.fptrunc(scaled, eight))
        return _joined(builder, parts)
    return vector(totals, types.intp), codegen


@intrinsic
def raise_bits(typing_context, largest, value):
    """``largest`` raised, lane by lane, to the absolute bit patterns of a vector."""
    def codegen(context, builder, signature, arguments):
        largest, value = arguments
        magnitude = builder.and_(builder.bitcast(value, _V32), _constant(_V32, 0x7FFFFFFF))
        highest = _declare(builder, "llvm.umax.v16i32", _V32, [_V32, _V32])
        return builder.insert_value(largest, builder.call(highest, [builder.extract_value(largest, 0), magnitude]), 0)
    return largest(largest, vector), codegen


@intrinsic
def all_below(typing_context, bits, limit):
    """Whether all lanes of ``tile_add_totals``' result are below a bit pattern, int32."""
    def codegen(context, builder, signature, arguments):
        lanes, limit = arguments
        below = builder.icmp_unsigned("<", builder.extract_value(lanes, 0), _splat32(builder, limit))
        mask = builder.bitcast(below, ir.IntType(LANES))
        return builder.icmp_unsigned("==", mask, ir.Constant(ir.IntType(LANES), 2**LANES - 1))
    return types.boolean(bits, types.int32), codegen
