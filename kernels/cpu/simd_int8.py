"""Vectors of bytes and exact int8 dot products for AVX-512 with VNNI, and the 7-bit codes of ``q3_5`` with VBMI.

``bytes64`` is 64 bytes: four neighbouring k of each of 16 rows. ``Counts`` is sixteen int32 for each of a few tokens. One
``dot`` multiplies unsigned weights (offset by 128) by signed activations and adds to the counts, which start at the
correction -128 * sum(x). Load these intrinsics only where the target has them: LLVM aborts on the others.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .simd import _F32, _I8, _I32, _I64, _V32, _VF, LANES, _constant, _declare, _element, _fma, _pointer, _splat, vector

_VB = ir.VectorType(_I8, 64)


class Bytes(types.Type):
    """Sixty-four bytes."""

    def __init__(self):
        super().__init__(name="bytes64")


class Counts(types.Type):
    """``tokens`` vectors of sixteen int32."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        super().__init__(name=f"counts({tokens})")


@register_model(Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VB)


@register_model(Counts)
class _CountsModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_V32, fe_type.tokens))


bytes64 = Bytes()


def _splat32(builder, scalar):
    undefined = ir.Constant(_V32, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_V32, 0))


@intrinsic
def load_bytes(typing_context, array, index):
    """array[index : index + 64] of an int8 array."""
    def codegen(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, *arguments)
        value = builder.load(builder.bitcast(pointer, _VB.as_pointer()))
        value.align = 1
        return value
    return bytes64(array, types.intp), codegen


@intrinsic
def store_bytes(typing_context, array, index, value):
    """array[index : index + 64] = value, int8."""
    def codegen(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], arguments[1])
        builder.store(arguments[2], builder.bitcast(pointer, _VB.as_pointer())).align = 1
        return context.get_dummy_value()
    return types.void(array, types.intp, bytes64), codegen


@intrinsic
def codes_of(typing_context, packed):
    """The 64 7-bit codes in the first 56 of 64 bytes, one a byte; the eighth bit of each is arbitrary (VBMI)."""
    def codegen(context, builder, signature, arguments):
        undefined = ir.Constant(_VB, ir.Undefined)
        # Byte 7 of every eight is not looked at by the shifts that matter.
        places = ir.Constant(ir.VectorType(_I32, 64), [min(i // 8 * 7 + i % 8, 63) for i in range(64)])
        spread = builder.shuffle_vector(arguments[0], undefined, places)
        shifts = ir.Constant(_VB, [7 * (i % 8) for i in range(64)])
        name = "llvm.x86.avx512.pmultishift.qb.512"
        return builder.call(_declare(builder, name, _VB, [_VB] * 2), [shifts, spread])
    return bytes64(bytes64), codegen


@intrinsic
def look_up(typing_context, codes, low, high):
    """Byte codes[i] & 127 of the table of 128 bytes ``low``, ``high`` for every i (VBMI)."""
    def codegen(context, builder, signature, arguments):
        codes, low, high = arguments
        function = _declare(builder, "llvm.x86.avx512.vpermi2var.qi.512", _VB, [_VB] * 3)
        return builder.call(function, [low, codes, high])
    return bytes64(bytes64, bytes64, bytes64), codegen


@intrinsic
def counts_start(typing_context, tile, corrections, offset, stride):
    """Counts for the tokens of ``tile``, starting at corrections[offset + t * stride] in every lane."""
    counts = Counts(tile.tokens)
    def codegen(context, builder, signature, arguments):
        _, array, offset, stride = arguments
        result = ir.Constant(context.get_value_type(counts), ir.Undefined)
        for t in range(counts.tokens):
            start = builder.load(_element(context, builder, corrections, array, offset, stride, t))
            result = builder.insert_value(result, _splat32(builder, start), t)
        return result
    return counts(tile, corrections, types.intp, types.intp), codegen


def _dot(builder, counts, weights, spread):
    function = _declare(builder, "llvm.x86.avx512.vpdpbusd.512", _V32, [_V32, _VB, _VB])
    return builder.call(function, [counts, weights, spread])


def _spread_four(context, builder, x, values, offset, stride, token):
    """The four bytes at x[offset + token * stride], sixteen times."""
    pointer = _element(context, builder, x, values, offset, stride, token)
    four = builder.load(builder.bitcast(pointer, _I32.as_pointer()))
    four.align = 1
    return builder.bitcast(_splat32(builder, four), _VB)


@intrinsic
def dot(typing_context, counts, weights, x, offset, stride):
    """counts[t] += the dot product of each lane's four weights with the four int8 at x[offset + t * stride] (VNNI)."""
    def codegen(context, builder, signature, arguments):
        result, weights, values, offset, stride = arguments
        for t in range(counts.tokens):
            spread = _spread_four(context, builder, x, values, offset, stride, t)
            result = builder.insert_value(result, _dot(builder, builder.extract_value(result, t), weights, spread), t)
        return result
    return counts(counts, bytes64, x, types.intp, types.intp), codegen


@intrinsic
def dot_two(typing_context, counts, weights0, weights1, x, offset, stride):
    """As ``dot`` for two tiles of rows that share the loads of x; ``counts`` holds both, first tile first."""
    tokens = counts.tokens // 2
    def codegen(context, builder, signature, arguments):
        result, weights0, weights1, values, offset, stride = arguments
        for t in range(tokens):
            spread = _spread_four(context, builder, x, values, offset, stride, t)
            for place, weights in ((t, weights0), (tokens + t, weights1)):
                value = _dot(builder, builder.extract_value(result, place), weights, spread)
                result = builder.insert_value(result, value, place)
        return result
    return counts(counts, bytes64, bytes64, x, types.intp, types.intp), codegen


@intrinsic
def counts_twice(typing_context, counts):
    """Counts for two tiles of rows, both starting as ``counts``."""
    twice = Counts(2 * counts.tokens)
    def codegen(context, builder, signature, arguments):
        result = ir.Constant(context.get_value_type(twice), ir.Undefined)
        for place in range(twice.tokens):
            result = builder.insert_value(result, builder.extract_value(arguments[0], place % counts.tokens), place)
        return result
    return twice(counts), codegen


@intrinsic
def tile_fma_counts(typing_context, tile, counts, part, factors, scales, offset, stride):
    """tile[t] = fma(float32(counts[t]), factors * scales[offset + t * stride], tile[t]) for every token t.

    ``part``, a literal, chooses the tile of rows in counts of two.
    """
    if not isinstance(part, types.IntegerLiteral):
        return None
    first = part.literal_value * tile.tokens
    def codegen(context, builder, signature, arguments):
        result, counts, _, factors, values, offset, stride = arguments
        for t in range(tile.tokens):
            scalar = builder.load(_element(context, builder, scales, values, offset, stride, t))
            scale = builder.fmul(factors, _splat(builder, scalar))
            dots = builder.sitofp(builder.extract_value(counts, first + t), _VF)
            result = builder.insert_value(result, _fma(builder, dots, scale, builder.extract_value(result, t)), t)
        return result
    return tile(tile, counts, part, vector, scales, types.intp, types.intp), codegen


@intrinsic
def no_bits(typing_context):
    """Sixteen zeros, the start of ``tile_add_totals``."""
    bits = Counts(1)
    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(bits), [[0] * LANES])
    return bits(), codegen


@intrinsic
def tile_add_totals(typing_context, tile, scales, totals, offset, stride, largest):
    """totals[offset + t * stride …+ 16] (int64) += rint(tile[t] * scales) for every token t.

    ``scales`` are row scales times 2**32: a power of two commutes with rounding. Returns ``largest``, in each lane the
    highest absolute bit pattern of the products, raised by these; a product out of range adds anything.
    """
    def codegen(context, builder, signature, arguments):
        values, scales, array, offset, stride, largest = arguments
        half, wide = ir.VectorType(_F32, LANES // 2), ir.VectorType(_I64, LANES // 2)
        convert = _declare(builder, "llvm.x86.avx512.mask.cvtps2qq.512", wide, [half, wide, _I8, _I32])
        highest = _declare(builder, "llvm.umax.v16i32", _V32, [_V32, _V32])
        zeros, everything, nearest = ir.Constant(wide, [0] * (LANES // 2)), ir.Constant(_I8, -1), ir.Constant(_I32, 4)
        bits = builder.extract_value(largest, 0)
        for t in range(tile.tokens):
            product = builder.fmul(builder.extract_value(values, t), scales)
            magnitude = builder.and_(builder.bitcast(product, _V32), _constant(_V32, 0x7FFFFFFF))
            bits = builder.call(highest, [bits, magnitude])
            for part in range(2):
                lanes = ir.Constant(ir.VectorType(_I32, LANES // 2), [part * LANES // 2 + i for i in range(LANES // 2)])
                eight = builder.shuffle_vector(product, ir.Constant(_VF, ir.Undefined), lanes)
                whole = builder.call(convert, [eight, zeros, everything, nearest])
                index = builder.add(offset, ir.Constant(offset.type, part * LANES // 2))
                address = builder.bitcast(_element(context, builder, totals, array, index, stride, t), wide.as_pointer())
                old = builder.load(address)
                old.align = 8
                builder.store(builder.add(old, whole), address).align = 8
        return builder.insert_value(largest, bits, 0)
    return largest(tile, vector, totals, types.intp, types.intp, largest), codegen


@intrinsic
def all_below(typing_context, bits, limit):
    """Whether all lanes of ``tile_add_totals``' result are below a bit pattern, int32."""
    def codegen(context, builder, signature, arguments):
        lanes, limit = arguments
        below = builder.icmp_unsigned("<", builder.extract_value(lanes, 0), _splat32(builder, limit))
        mask = builder.bitcast(below, ir.IntType(LANES))
        return builder.icmp_unsigned("==", mask, ir.Constant(ir.IntType(LANES), 2**LANES - 1))
    return types.boolean(bits, types.int32), codegen


@intrinsic
def choose_factors(typing_context, indices, index, table):
    """Sixteen floats table[i] for the sixteen 4-bit indices in the bytes indices[index : index + 8]."""
    def codegen(context, builder, signature, arguments):
        array, index, table = arguments
        both = builder.load(builder.bitcast(_pointer(context, builder, indices, array, index), _I64.as_pointer()))
        both.align = 1
        undefined = ir.Constant(_V32, ir.Undefined)
        low, high = builder.trunc(both, _I32), builder.trunc(builder.lshr(both, ir.Constant(_I64, 32)), _I32)
        words = builder.insert_element(builder.insert_element(undefined, low, ir.Constant(_I32, 0)), high, ir.Constant(_I32, 1))
        words = builder.shuffle_vector(words, undefined, ir.Constant(_V32, [0] * 8 + [1] * 8))
        shifts = ir.Constant(_V32, [4 * (i % 8) for i in range(LANES)])
        places = builder.and_(builder.lshr(words, shifts), _constant(_V32, 15))
        return builder.call(_declare(builder, "llvm.x86.avx512.permvar.sf.512", _VF, [_VF, _V32]), [table, places])
    return vector(indices, types.intp, vector), codegen
