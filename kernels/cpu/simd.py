"""Vector types and intrinsics for Numba: sixteen float32 lanes, written as LLVM vectors that any target can lower.

A kernel written with these says exactly which sums are chains and which lanes are independent, so no optimiser decides
an order. ``vector`` is sixteen float32; ``Tile`` is one such vector for each of a few tokens, kept in registers.
Loads take a pointer or a C-contiguous array of any rank, and a flat index; the dtype chooses the conversion: float32 as it
is, int8 by value, uint16 as the bits of a float16.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from . import target

LANES = 16

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VF, _V8, _V16, _V32, _V64 = (ir.VectorType(t, LANES) for t in (_F32, _I8, _I16, _I32, _I64))
_VH = ir.VectorType(ir.HalfType(), LANES)


class Vector(types.Type):
    """Sixteen float32."""

    def __init__(self):
        super().__init__(name="vector")


class Tile(types.Type):
    """Sixteen outputs of each of some tokens, one vector each; with ``tiles`` 2 thirty-two, two vectors in a row each."""

    def __init__(self, tokens: int, tiles: int = 1):
        self.tokens, self.tiles, self.vectors = tokens, tiles, tokens * tiles
        super().__init__(name=f"tile({tokens}, {tiles})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VF)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(_VF, fe_type.vectors))


vector = Vector()


def _declare(builder, name, result, arguments):
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def _fma(builder, a, b, c):
    return builder.call(_declare(builder, "llvm.fma.v16f32", _VF, [_VF] * 3), [a, b, c])


def _constant(llvm_vector, value):
    return ir.Constant(llvm_vector, [value] * LANES)


def _splat(builder, scalar):
    undefined = ir.Constant(_VF, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_V32, 0))


def _pointer(context, builder, array_type, array, index):
    if isinstance(array_type, types.CPointer):
        return builder.gep(array, [index])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _element(context, builder, array_type, array, offset, stride, token):
    """Pointer to array[offset + token * stride]."""
    index = builder.add(offset, builder.mul(stride, ir.Constant(stride.type, token)))
    return _pointer(context, builder, array_type, array, index)


def _vector_at(builder, pointer, llvm_vector, alignment):
    value = builder.load(builder.bitcast(pointer, llvm_vector.as_pointer()))
    value.align = alignment
    return value


def _loop(builder, count, values, body):
    """Emits ``for i in range(count): values = body(i, values)``, at least once; returns the last values.

    Loops that carry register tiles are written as such: unrolled by hand, LLVM hoists their loads until registers run out.
    """
    before, head = builder.block, builder.append_basic_block("loop")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(count.type)
    index.add_incoming(ir.Constant(count.type, 0), before)
    carried = [builder.phi(value.type) for value in values]
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, before)
    after = body(index, carried)
    following = builder.add(index, ir.Constant(count.type, 1))
    index.add_incoming(following, builder.block)
    for phi, value in zip(carried, after, strict=True):
        phi.add_incoming(value, builder.block)
    done = builder.append_basic_block("done")
    back = builder.cbranch(builder.icmp_signed("<", following, count), head, done)
    back.set_metadata("llvm.loop", _not_unrolled(builder.module))
    builder.position_at_end(done)
    return after


def _not_unrolled(module):
    """A loop's identity (a node that refers to itself) with the wish not to be unrolled."""
    wish = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    node = ir.MDValue(module, [], name=str(len(module.metadata)))
    node.operands = (node, wish)
    return node


def _half_to_float(builder, half):
    """Exact: the magnitude's bits are moved to their float32 place and the exponent bias is mended by a power of two."""
    wide = builder.zext(half, _V32)
    sign = builder.shl(builder.and_(wide, _constant(_V32, 0x8000)), _constant(_V32, 16))
    magnitude = builder.shl(builder.and_(wide, _constant(_V32, 0x7FFF)), _constant(_V32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, _VF), _constant(_VF, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, _V32), sign), _VF)


def _load(builder, dtype, pointer):
    if dtype == types.float32:
        return _vector_at(builder, pointer, _VF, 4)
    if dtype == types.int8:
        return builder.sitofp(_vector_at(builder, pointer, _V8, 1), _VF)
    half = _vector_at(builder, pointer, _V16, 2)
    if target.converts_halves():
        return builder.fpext(builder.bitcast(half, _VH), _VF)
    return _half_to_float(builder, half)


@intrinsic
def load(typing_context, array, index):
    """array[index : index + 16] as a vector."""
    if array.dtype not in (types.float32, types.int8, types.uint16):
        return None
    def codegen(context, builder, signature, arguments):
        return _load(builder, array.dtype, _pointer(context, builder, array, *arguments))
    return vector(array, types.intp), codegen


@intrinsic
def store(typing_context, array, index, value):
    """array[index : index + 16] = value, float32."""
    if array.dtype != types.float32:
        return None
    def codegen(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], arguments[1])
        builder.store(arguments[2], builder.bitcast(pointer, _VF.as_pointer())).align = 4
        return context.get_dummy_value()
    return types.void(array, types.intp, vector), codegen


@intrinsic
def splat(typing_context, scalar):
    """A vector of sixteen times the same float32."""
    def codegen(context, builder, signature, arguments):
        return _splat(builder, arguments[0])
    return vector(types.float32), codegen


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once, in each lane."""
    def codegen(context, builder, signature, arguments):
        return _fma(builder, *arguments)
    return vector(vector, vector, vector), codegen


@intrinsic
def multiply(typing_context, a, b):
    """a * b in each lane."""
    def codegen(context, builder, signature, arguments):
        return builder.fmul(*arguments)
    return vector(vector, vector), codegen


@intrinsic
def add(typing_context, a, b):
    """a + b in each lane."""
    def codegen(context, builder, signature, arguments):
        return builder.fadd(*arguments)
    return vector(vector, vector), codegen


@intrinsic
def fma_scalar(typing_context, a, b, c):
    """a * b + c for float32 scalars, rounded once."""
    def codegen(context, builder, signature, arguments):
        return builder.call(_declare(builder, "llvm.fma.f32", _F32, [_F32] * 3), arguments)
    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def rint(typing_context, value):
    """float32 rounded to a whole number, half to even."""
    def codegen(context, builder, signature, arguments):
        return builder.call(_declare(builder, "llvm.rint.f32", _F32, [_F32]), arguments)
    return types.float32(types.float32), codegen


@intrinsic
def float_from_bits(typing_context, bits):
    """The float32 with these 32 bits."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)
    return types.float32(types.int32), codegen


@intrinsic
def bits_of(typing_context, value):
    """The 32 bits of a float32, as int32."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)
    return types.int32(types.float32), codegen


@intrinsic
def tile_zeros(typing_context, tokens, tiles):
    """A tile of zeros for a literal number of tokens, of one or two (literal) ``tiles`` of 16 outputs."""
    if not isinstance(tokens, types.IntegerLiteral) or not isinstance(tiles, types.IntegerLiteral):
        return None
    tile = Tile(tokens.literal_value, tiles.literal_value)
    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(tile), [[0.0] * LANES] * tile.vectors)
    return tile(tokens, tiles), codegen


@intrinsic
def tile_clear(typing_context, tile):
    """A tile of zeros of the same shape."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(tile), [[0.0] * LANES] * tile.vectors)
    return tile(tile), codegen


@intrinsic
def tile_fma(typing_context, tile, weights, x, offset, stride):
    """tile[t] = fma(weights, x[offset + t * stride], tile[t]) for every token t."""
    def codegen(context, builder, signature, arguments):
        result, weights, values, offset, stride = arguments
        for t in range(tile.tokens):
            scalar = builder.load(_element(context, builder, x, values, offset, stride, t))
            chain = _fma(builder, weights, _splat(builder, scalar), builder.extract_value(result, t))
            result = builder.insert_value(result, chain, t)
        return result
    return tile(tile, vector, x, types.intp, types.intp), codegen


@intrinsic
def tile_fma_scaled(typing_context, tile, dots, factors, scales, offset, stride):
    """tile[t] = fma(dots[t], factors * scales[offset + t * stride], tile[t]) for every token t."""
    def codegen(context, builder, signature, arguments):
        result, dots, factors, values, offset, stride = arguments
        for t in range(tile.tokens):
            scalar = builder.load(_element(context, builder, scales, values, offset, stride, t))
            scale = builder.fmul(factors, _splat(builder, scalar))
            chain = _fma(builder, builder.extract_value(dots, t), scale, builder.extract_value(result, t))
            result = builder.insert_value(result, chain, t)
        return result
    return tile(tile, tile, vector, scales, types.intp, types.intp), codegen


def _add_fixed(builder, value, pointer, fixed, limit):
    """Adds rint(value * fixed) to sixteen int64 in memory, zero in lanes not below the limit; returns whether all lanes were."""
    magnitude = builder.call(_declare(builder, "llvm.fabs.v16f32", _VF, [_VF]), [value])
    within = builder.fcmp_ordered("<", magnitude, _splat(builder, limit))
    scaled = builder.fmul(builder.select(within, value, _constant(_VF, 0.0)), _splat(builder, fixed))
    whole = builder.fptosi(builder.call(_declare(builder, "llvm.rint.v16f32", _VF, [_VF]), [scaled]), _V64)
    address = builder.bitcast(pointer, _V64.as_pointer())
    builder.store(builder.add(_vector_at(builder, pointer, _V64, 8), whole), address).align = 8
    mask = builder.bitcast(within, ir.IntType(LANES))
    return builder.icmp_unsigned("==", mask, ir.Constant(ir.IntType(LANES), 2**LANES - 1))


@intrinsic
def tile_add_fixed(typing_context, tile, row_scales, sums, offset, stride, fixed, limit):
    """sums[i : i + 16] (int64) += rint(tile[t] * row_scales * fixed), i = offset + t * stride, for every token t.

    A lane not below the limit adds zero; returns whether all lanes were below it.
    """
    def codegen(context, builder, signature, arguments):
        values, row_scales, array, offset, stride, fixed, limit = arguments
        within = ir.Constant(ir.IntType(1), 1)
        for t in range(tile.tokens):
            value = builder.fmul(builder.extract_value(values, t), row_scales)
            pointer = _element(context, builder, sums, array, offset, stride, t)
            within = builder.and_(within, _add_fixed(builder, value, pointer, fixed, limit))
        return within
    signature = types.boolean(tile, vector, sums, types.intp, types.intp, types.float32, types.float32)
    return signature, codegen


@intrinsic
def tile_sum(typing_context, tile):
    """The sum of a tile's vectors, lane by lane, first token first."""
    def codegen(context, builder, signature, arguments):
        total = builder.extract_value(arguments[0], 0)
        for t in range(1, tile.vectors):
            total = builder.fadd(total, builder.extract_value(arguments[0], t))
        return total
    return vector(tile), codegen
