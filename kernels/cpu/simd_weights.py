"""How weights lie in memory, and their bytes and factors as vectors: sixteen rows at a time, on any target.

``bytes64`` is 64 bytes: four k of each of 16 rows. A ``Kind`` names a layout: two neighbouring groups of 32 k of 16 rows are a
pair of groups; a line of 64 bytes holds the factors of the pairs behind it.

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
from ..numerics import GROUP
from . import target
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
    _half_to_float,
    _pointer,
    _vector_at,
    vector,
)
from .simd_dots import _VB, BYTES, _joined, _vectors

PAIR_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STEPS = GROUP // 4              # dot products of four k in a group


class Bytes(types.Type):
    """Sixty-four bytes."""

    def __init__(self):
        super().__init__(name="bytes64")


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


class Table(types.Type):
    """The codebook of ``codes``: first values of the 128 pairs, then second ones, in four vectors."""

    def __init__(self):
        super().__init__(name="table")


@register_model(Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VB)


bytes64 = Bytes()


@register_model(Kind)
@register_model(FloatKind)
class _KindModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _I8)


@register_model(Raw)
class _RawModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _I8.as_pointer())


@register_model(Table)
class _TableModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_VB, 4))


table_type = Table()


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
def raw_at(typing_context, kind, array, index):
    """The weights of a pair of groups at array[index], which are not codes; int8, an address that is a multiple of 64."""
    raw = Raw(kind)
    def codegen(context, builder, signature, arguments):
        return _pointer(context, builder, array, *arguments[1:])
    return raw(kind, array, types.intp), codegen


@intrinsic
def looked_up(typing_context, kind):
    """Whether weights are codes."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), int(kind.layout == "codes"))
    return types.boolean(kind), codegen


@intrinsic
def decoded(typing_context, kind):
    """The Kind of weights that have been looked up."""
    result = KINDS["bytes"] if kind.layout == "codes" else kind
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_I8, 0)
    return result(kind), codegen


@intrinsic
def decode_pair(typing_context, kind, table, array, index, target, place):
    """target[place : place + 1024], int8, a multiple of 64: a pair of groups of codes at array[index] as ``bytes``."""
    def codegen(context, builder, signature, arguments):
        _, table, array_value, index, target_value, place = arguments
        if kind.layout != "codes":
            return context.get_dummy_value()
        raw, chosen = _pointer(context, builder, array, array_value, index), table_vectors(builder, table)
        for step in range(2 * STEPS):
            half, number, odd = step // STEPS, step % STEPS // 2, step % 2
            (weights,) = step_weights(builder, kind, raw, chosen, half, ir.Constant(_I64, number), odd, None)
            where = _pointer(context, builder, target, target_value, builder.add(place, ir.Constant(_I64, step * BYTES)))
            builder.store(weights, builder.bitcast(where, _VB.as_pointer())).align = BYTES
        return context.get_dummy_value()
    return types.void(kind, table, array, types.intp, target, types.intp), codegen


@intrinsic
def no_table(typing_context):
    """A codebook for weights that need none."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(table_type), ir.Undefined)
    return table_type(), codegen


@intrinsic
def address_of(typing_context, pointer):
    """Where a pointer points to."""
    def codegen(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], _I64)
    return types.intp(pointer), codegen


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


def table_vectors(builder, table):
    return [builder.extract_value(table, i) for i in range(4)]


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


def step_weights(builder, kind, raw, table, half, number, odd, method):
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


@intrinsic
def factors_of(typing_context, kind, line, half):
    """Factors of 16 rows of one group of a pair; ``half`` is a literal, and the line of indices has been moved to the pair."""
    if not isinstance(half, types.IntegerLiteral):
        return None
    group = half.literal_value
    def codegen(context, builder, signature, arguments):
        chosen = factors_or_indices(builder, kind, arguments[1], group)
        return _choose(builder, chosen) if kind.indexed else chosen
    return vector(kind, bytes64, half), codegen


def factors_or_indices(builder, kind, line, group):
    """Factors of 16 rows of one group of a pair; of indices the words whose lowest four bits they are."""
    if kind.indexed:
        words = builder.bitcast(line, _V32)
        return builder.lshr(words, _constant(_V32, 4 * group)) if group else words
    halves = _vectors(builder, builder.bitcast(line, ir.VectorType(_I16, 32)), ir.VectorType(_I16, 32), 2)[group]
    if target.converts_halves():
        return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), _VF)
    return _half_to_float(builder, builder.bitcast(halves, _V16))


def scaled_factors(builder, kind, scale, chosen):
    """Products of a scale with the factors of each of some tiles, as ``factors_or_indices`` gives them."""
    if not kind.indexed:
        return [builder.fmul(factors, scale) for factors in chosen]
    products = builder.fmul(ir.Constant(_VF, FACTORS.tolist()), scale)
    return [_permuted(builder, products, words) for words in chosen]


def _permuted(builder, sixteen, words):
    """sixteen[the lowest four bits of each lane]."""
    return builder.call(_declare(builder, "llvm.x86.avx512.permvar.sf.512", _VF, [_VF, _V32]), [sixteen, words])


def _choose(builder, words):
    """FACTORS[the lowest four bits of each lane]."""
    if target.vector_bits() == 512:
        return _permuted(builder, ir.Constant(_VF, FACTORS.tolist()), words)
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


def _bytes_of(value):
    return ir.Constant(_VB, [value] * BYTES)
