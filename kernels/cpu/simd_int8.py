"""Weights as bytes, and exact int8 dot products: sixteen rows at a time, for a few tokens, on any target.

``bytes64`` is 64 bytes: four k of each of 16 rows. ``Counts`` is sixteen int32 for each of a few tokens. A dot product
(``simd_dots``) multiplies unsigned weights by signed activations and adds to the counts, which start at the correction for the
weights' offset.

A ``Kind`` says how weights lie in memory. Two neighbouring groups of 32 k of 16 rows are a pair of groups; a line of 64 bytes
holds the factors of the pairs behind it:

=========  =====================  ======================================================================================
kind       a pair of groups       line of factors
=========  =====================  ======================================================================================
``codes``  7 x 64 bytes           for 4 pairs: in each of 16 words (rows) eight 4-bit indices into FACTORS, first group lowest
``bytes``  16 x 64 bytes          likewise
``halves`` 16 x 64 bytes          for 1 pair: 16 float16 of the first group, 16 of the second
``nibble`` 8 x 64 bytes           likewise
=========  =====================  ======================================================================================

Byte i of vector j < 7 of ``codes`` holds a 7-bit code, and in its highest bit bit j of code i of an eighth vector. A code stands
for two weights: vectors 0 to 3 are the first group, 4 to 7 the second. In a ``nibble`` byte the low four bits belong to an even
step. Weights of a group take part in eight steps of four k: ``PAIR_ORDER`` in every eight k.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from ..formats import FACTORS
from ..numerics import GROUP, INFINITY_BITS, TINY, UNFIXED
from . import simd_dots, target
from .simd import (
    _F32,
    _I8,
    _I16,
    _I32,
    _I64,
    _V16,
    _V32,
    _VF,
    LANES,
    _constant,
    _declare,
    _element,
    _fma,
    _half_to_float,
    _loop,
    _pointer,
    _splat,
    _vector_at,
    vector,
)
from .simd_dots import _VB, BYTES, _joined, _vectors

PAIR_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STEPS = GROUP // 4              # dot products of four k in a group
UNIT = 8                        # groups whose activations lie together


class Bytes(types.Type):
    """Sixty-four bytes."""

    def __init__(self):
        super().__init__(name="bytes64")


class Counts(types.Type):
    """``vectors`` of sixteen int32: for each token of a ``Tile`` one for each of its ``tiles``."""

    def __init__(self, tokens: int, tiles: int = 1):
        self.tokens, self.tiles, self.vectors = tokens, tiles, tokens * tiles
        super().__init__(name=f"counts({tokens}, {tiles})")


class Kind(types.Type):
    """A layout of weights: ``vectors`` of 64 bytes a pair of groups, ``line_pairs`` pairs a line of factors, and what to subtract
    from a weight as stored: 128 >> ``shift``."""

    def __init__(self, name: str, vectors: int, line_pairs: int, shift: int = 0):
        self.layout, self.vectors, self.line_pairs, self.shift = name, vectors, line_pairs, shift
        super().__init__(name=f"kind({name})")

    @property
    def indexed(self) -> bool:
        """Whether factors are indices into FACTORS."""
        return self.line_pairs == 4

    @property
    def nibbles(self) -> bool:
        """Whether stored weights are below 16."""
        return self.shift == 4

    def tile_bytes(self, groups: int) -> int:
        """Bytes of 16 rows of so many groups."""
        pairs = -(-groups // 2)
        return (pairs * self.vectors + -(-pairs // self.line_pairs)) * BYTES


KINDS = {kind.layout: kind for kind in (
    Kind("codes", 7, 4), Kind("bytes", 16, 4), Kind("halves", 16, 1), Kind("nibble", 8, 1, 4))}


class FloatKind(types.Type):
    """Weights that are not quantised: interleaved elements."""

    def __init__(self, name: str, element: types.Type):
        self.layout, self.element = name, element
        super().__init__(name=f"kind({name})")


FLOAT_KINDS = {kind.layout: kind for kind in (FloatKind("f32", types.float32), FloatKind("f16", types.uint16))}


class Raw(types.Type):
    """Weights of a pair of groups of 16 rows: of ``codes`` eight vectors, of other kinds their place in memory."""

    def __init__(self, kind: Kind):
        self.kind = kind
        super().__init__(name=f"raw({kind.layout})")


@register_model(Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VB)


@register_model(Counts)
class _CountsModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_V32, fe_type.vectors))


@register_model(Kind)
@register_model(FloatKind)
class _KindModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _I8)


@register_model(Raw)
class _RawModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _I8.as_pointer())


bytes64 = Bytes()


def _splat32(builder, scalar):
    undefined = ir.Constant(_V32, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_V32, 0))


def _bytes_of(value):
    return ir.Constant(_VB, [value] * BYTES)


@intrinsic
def kind(typing_context, name):
    """The Kind of a literal name."""
    if not isinstance(name, types.StringLiteral):
        return None
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_I8, 0)
    return (KINDS | FLOAT_KINDS)[name.literal_value](name), codegen


@intrinsic
def elements_at(typing_context, kind, where):
    """A pointer to the elements of weights that are not quantised."""
    pointer = types.CPointer(kind.element)
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))
    return pointer(kind, types.intp), codegen


@intrinsic
def vectors_of(typing_context, kind):
    """Vectors of 64 bytes of a pair of groups."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_I64, kind.vectors)
    return types.intp(kind), codegen


@intrinsic
def line_pairs_of(typing_context, kind):
    """Pairs of groups that share a line of factors."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_I64, kind.line_pairs)
    return types.intp(kind), codegen


def _load_at(context, builder, array_type, array, index, alignment=1):
    value = builder.load(builder.bitcast(_pointer(context, builder, array_type, array, index), _VB.as_pointer()))
    value.align = alignment
    return value


@intrinsic
def load_bytes(typing_context, array, index):
    """array[index : index + 64] of an int8 array."""
    def codegen(context, builder, signature, arguments):
        return _load_at(context, builder, array, *arguments)
    return bytes64(array, types.intp), codegen


@intrinsic
def load_line(typing_context, tile, number, array, index, ahead):
    """The line of factors at array[index] of the tile of a literal ``number``, anything where there is none.

    Prefetches what lies ``ahead`` bytes behind.
    """
    if not isinstance(number, types.IntegerLiteral):
        return None
    def codegen(context, builder, signature, arguments):
        _, _, array_value, index, ahead = arguments
        if number.literal_value >= tile.tiles:
            return ir.Constant(_VB, ir.Undefined)
        _prefetch(context, builder, array, array_value, builder.add(index, ahead))
        return _load_at(context, builder, array, array_value, index, BYTES)
    return bytes64(tile, number, array, types.intp, types.intp), codegen


@intrinsic
def load_raw(typing_context, kind, tile, array, index, apart, ahead):
    """The weights of a pair of groups at array[index], int8, an address that is a multiple of 64, and ``apart`` bytes behind it
    those of the second tile, if ``tile`` has two.

    Prefetches what lies ``ahead`` bytes behind.
    """
    raw = Raw(kind)
    def codegen(context, builder, signature, arguments):
        _, _, array_value, index, apart, ahead = arguments
        later = builder.add(index, ahead)
        for _ in range(tile.tiles):
            for j in range(kind.vectors):
                _prefetch(context, builder, array, array_value, builder.add(later, ir.Constant(index.type, j * BYTES)))
            later = builder.add(later, apart)
        return _pointer(context, builder, array, array_value, index)
    return raw(kind, tile, array, types.intp, types.intp, types.intp), codegen


def _prefetch(context, builder, array_type, array, index, write=0):
    pointer = builder.bitcast(_pointer(context, builder, array_type, array, index), _I8.as_pointer())
    function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    builder.call(function, [pointer, ir.Constant(_I32, write), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _shift_right(builder, value, count, words):
    shifted = builder.lshr(builder.bitcast(value, words), ir.Constant(words, [count] * words.count))
    return builder.bitcast(shifted, value.type)


def _look_up(builder, table, codes):
    """Byte codes[i] & 127 of a table of two vectors (VBMI)."""
    function = _declare(builder, "llvm.x86.avx512.vpermi2var.qi.512", _VB, [_VB] * 3)
    return builder.call(function, [table[0], codes, table[1]])


def _codes(builder, raw, number):
    """One of the eight vectors of codes of a pair of groups."""
    def stored(j):
        return _vector_at(builder, builder.gep(raw, [ir.Constant(_I64, j * BYTES)]), _VB, BYTES)
    if number < 7:
        return stored(number)
    high, words, eighth = _bytes_of(0x80), ir.VectorType(_I64, 8), None
    for j in range(7):
        bits = builder.and_(stored(j), high)
        # A bit moves to the next lower place; the lowest, which would fall into the neighbouring byte, is still zero.
        eighth = bits if eighth is None else builder.or_(_shift_right(builder, eighth, 1, words), bits)
    return _shift_right(builder, eighth, 1, words)


def _weights(builder, kind, raw, table, half, number, odd, method):
    """The unsigned weights of step 2 * number + odd of one group of a pair, in the parts that ``method`` works on.

    ``table``: four vectors. ``number`` is a constant for ``codes``.
    """
    if kind.layout == "codes":
        codes = _codes(builder, raw, STEPS // 2 * half + number.constant)
        return [_look_up(builder, table[2 * odd : 2 * odd + 2], codes)]
    size, together = BYTES // method.parts, BYTES if kind.nibbles else 2 * BYTES
    first = STEPS // 2 * half * together + (0 if kind.nibbles else odd * BYTES)
    parts = []
    for part in range(method.parts):
        at = builder.add(builder.mul(number, ir.Constant(_I64, together)), ir.Constant(_I64, first + part * size))
        stored = _vector_at(builder, builder.gep(raw, [at]), method.bytes, size)
        if kind.nibbles:
            stored = _shift_right(builder, stored, 4, method.words) if odd else stored
            stored = builder.and_(stored, ir.Constant(method.bytes, [15] * size))
        parts.append(stored)
    return parts


class Table(types.Type):
    """The codebook of ``codes``: first values of the 128 pairs, then second ones, in four vectors."""

    def __init__(self):
        super().__init__(name="table")


@register_model(Table)
class _TableModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_VB, 4))


table_type = Table()


@intrinsic
def load_table(typing_context, kind, array):
    """The codebook in int8 [256]; nothing for other kinds than ``codes``."""
    def codegen(context, builder, signature, arguments):
        result = ir.Constant(context.get_value_type(table_type), ir.Undefined)
        if kind.layout != "codes":
            return result
        for i in range(4):
            value = _load_at(context, builder, array, arguments[1], ir.Constant(_I64, i * BYTES))
            result = builder.insert_value(result, value, i)
        return result
    return table_type(kind, array), codegen


def _table(builder, table):
    return [builder.extract_value(table, i) for i in range(4)]


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
        chosen, method = _table(builder, table), simd_dots.best(kind.nibbles)
        raws = [raw, builder.gep(raw, [apart])][: counts.tiles]
        starts = [_vectors(builder, builder.extract_value(result, v), _V32, method.parts) for v in range(counts.vectors)]
        def two_steps(number, sums):
            sums = list(sums)
            for odd in range(2):
                at = builder.add(offset, builder.add(builder.mul(number, ir.Constant(_I64, 8)), ir.Constant(_I64, 4 * odd)))
                parts = [part for raw in raws for part in _weights(builder, kind, raw, chosen, group, number, odd, method)]
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
def prefetch_to_write(typing_context, array, index):
    """Asks for the cache line of array[index], which will be written."""
    def codegen(context, builder, signature, arguments):
        _prefetch(context, builder, array, *arguments, write=1)
        return context.get_dummy_value()
    return types.void(array, types.intp), codegen


@intrinsic
def prefetch_to_read(typing_context, array, index):
    """Asks for the cache line of array[index]."""
    def codegen(context, builder, signature, arguments):
        _prefetch(context, builder, array, *arguments)
        return context.get_dummy_value()
    return types.void(array, types.intp), codegen


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
def factors_of(typing_context, kind, line, half):
    """Factors of 16 rows of one group of a pair; ``half`` is a literal, and the line of indices has been moved to the pair."""
    if not isinstance(half, types.IntegerLiteral):
        return None
    group = half.literal_value
    def codegen(context, builder, signature, arguments):
        line = arguments[1]
        if kind.indexed:
            words = builder.bitcast(line, _V32)
            return _choose(builder, builder.lshr(words, _constant(_V32, 4 * group)) if group else words)
        halves = _vectors(builder, builder.bitcast(line, ir.VectorType(_I16, 32)), ir.VectorType(_I16, 32), 2)[group]
        if target.converts_halves():
            return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), _VF)
        return _half_to_float(builder, builder.bitcast(halves, _V16))
    return vector(kind, bytes64, half), codegen


def _choose(builder, words):
    """FACTORS[the lowest four bits of each lane]."""
    if target.vector_bits() == 512:
        table = ir.Constant(_VF, FACTORS.tolist())
        return builder.call(_declare(builder, "llvm.x86.avx512.permvar.sf.512", _VF, [_VF, _V32]), [table, words])
    if target.vector_bits() == 256:
        eight, index = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)
        function = _declare(builder, "llvm.x86.avx2.permps", eight, [eight, index])
        tables, parts = [ir.Constant(eight, FACTORS[first : first + 8].tolist()) for first in (0, 8)], []
        for part in _vectors(builder, words, _V32, 2):
            low, high = (builder.call(function, [table, part]) for table in tables)
            upper = builder.icmp_unsigned("!=", builder.and_(part, ir.Constant(index, [8] * 8)), ir.Constant(index, [0] * 8))
            parts.append(builder.select(upper, high, low))
        return _joined(builder, parts)
    table, result = _factor_table(builder), ir.Constant(_VF, ir.Undefined)
    places = builder.and_(words, _constant(_V32, LANES - 1))
    for lane in map(_lane, range(LANES)):
        entry = builder.gep(table, [_lane(0), builder.extract_element(places, lane)], inbounds=True)
        result = builder.insert_element(result, builder.load(entry), lane)
    return result


def _lane(number):
    return ir.Constant(_I32, number)


def _factor_table(builder):
    """FACTORS as a constant of the module."""
    found = builder.module.globals.get("llama_hpc.factors")
    if found is None:
        values = ir.Constant(ir.ArrayType(_F32, LANES), FACTORS.tolist())
        found = ir.GlobalVariable(builder.module, values.type, "llama_hpc.factors")
        found.initializer, found.global_constant, found.linkage = values, True, "internal"
    return found


@intrinsic
def next_line(typing_context, kind, line):
    """The line of factors moved on to the next pair of groups."""
    def codegen(context, builder, signature, arguments):
        return _shift_words(builder, arguments[1], 8) if kind.indexed else arguments[1]
    return bytes64(kind, bytes64), codegen


def _shift_words(builder, line, count):
    return builder.bitcast(builder.lshr(builder.bitcast(line, _V32), _constant(_V32, count)), _VB)


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
