"""Operations of a program between the products: embedding, norms, quantised activations. Canonical.

Reductions over a row are integer maxima or fixed-point integer sums.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from ..numerics import FIXED, GROUP, INFINITY_BITS, NOT_FINITE, OK, TINY, UNFIXED
from . import simd_int8 as int8
from . import simd_weights as coded
from .activations import activation_at
from .functions import half_value
from .memory import (
    atomic_or,
    float32_at,
    float64_at,
    int8_at,
    int32_at,
    int64_at,
    record,
    record_pointer,
    uint16_at,
)
from .operation import operation
from .simd import float_from_bits, rint
from .team import begin, chunk, work_at

NORM = record("team", "status", "work", "rows", "residual", "stride", "columns", "weight", "eps", "selected", "target", "offset")
EMBEDDING = record("team", "status", "work", "rows", "tokens", "first", "held", "columns", "data", "tile_bytes", "form", "out",
                   "stride")
INT8, INT4, FLOAT32, FLOAT16 = range(4)         # forms of an embedding table: kinds ``halves`` and ``nibble``, interleaved floats

_ONE, _Q = np.float32(1), np.float32(127)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LOWEST_SCALE_BITS = np.int32(27 << 23)         # 2**-100
_LANES = 16


@intrinsic
def _norm_at(typing_context, where):
    return record_pointer(NORM)


@intrinsic
def _embedding_at(typing_context, where):
    return record_pointer(EMBEDDING)


@njit(cache=True)
def largest_magnitude(bits, first, last):
    """Maximum of the absolute bit patterns of bits[first:last] (int32 view of float32)."""
    largest = np.int32(0)
    for i in range(first, last):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@njit(cache=True, error_model="numpy")
def rms_norm(x, bits, n, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) * weight for n float32 (RMSNorm, Zhang & Sennrich 2019); returns a kernel status.

    ``bits`` is x seen as int32. x is scaled by a power of two from its exact maximum, so that squares neither overflow nor
    vanish, and the squares are summed as 64-bit fixed point. ``out`` may be ``x``.
    """
    largest = largest_magnitude(bits, 0, n)
    if largest >= INFINITY_BITS:
        return NOT_FINITE
    unit = float_from_bits(max(largest & np.int32(0x7F800000), _LOWEST_SCALE_BITS))
    inverse, total = _ONE / unit, np.int64(0)
    for i in range(n):
        scaled = x[i] * inverse
        total += np.int64(rint((scaled * scaled) * FIXED))
    mean = (np.float64(total) * UNFIXED / n) * (np.float64(unit) * np.float64(unit)) + eps
    factor = np.float32(1.0 / np.sqrt(mean))
    for i in range(n):
        out[i] = (x[i] * factor) * weight[i]
    return OK


@njit(cache=True, error_model="numpy")
def quantize_group(target, row, group):
    """Quantises one group of a row of the activations ``target`` (a record ACTIVATION); returns a kernel status.

    q = rint(x * (127 / amax)) and scale = amax / 127; a group whose maximum is below 2**-100 is zero. A group starts afresh in
    each block; behind its last k are zeros.
    """
    block, place = group // target.per_block, group % target.per_block
    first = block * target.block + place * GROUP
    count = min(GROUP, (block + 1) * target.block - first, target.columns - first)
    per_unit = int8.UNIT // target.per_block * target.per_block
    at = (group // per_unit * target.capacity + row) * int8.UNIT + group % per_unit
    source = row * target.stride + first
    if count == GROUP:
        fine = int8.quantize_32(float32_at(target.values), source, int8_at(target.x), float32_at(target.scales),
                                int32_at(target.corrections), at)
        return OK if fine else NOT_FINITE
    values, x = float32_at(target.values), int8_at(target.x)
    largest = largest_magnitude(int32_at(target.values), source, source + count)
    if largest >= INFINITY_BITS:
        return NOT_FINITE
    amax = float_from_bits(largest)
    small = amax < TINY
    inverse = np.float32(0) if small else _Q / amax
    total = np.int32(0)
    for i in range(GROUP):
        value = np.int32(rint(values[source + i] * inverse)) if i < count else np.int32(0)
        total += value
        x[at * GROUP + i // 8 * 8 + i % 2 * 4 + i % 8 // 2] = value
    float32_at(target.scales)[at] = np.float32(0) if small else amax / _Q
    int32_at(target.corrections)[at] = np.int32(-128) * total
    return OK


@njit(cache=True)
def groups_of(target):
    """Groups of a row of activations."""
    whole, rest = target.columns // target.block, target.columns % target.block
    return whole * target.per_block + (rest + GROUP - 1) // GROUP


@njit(cache=True)
def _quantize_row(target, row):
    status = OK
    for group in range(groups_of(target)):
        status |= quantize_group(target, row, group)
    return status


@operation
def norm_operation(member, where):
    """RMS norm of rows of the residual (from row ``offset``, an int64, on, or the ``selected`` ones), then quantised."""
    op = carray(_norm_at(where), 1)[0]
    target, work = carray(activation_at(op.target), 1)[0], carray(work_at(op.work), 1)[0]
    rows, shift, status = int64_at(op.rows)[0], int64_at(op.offset)[0] if op.offset else 0, 0
    begin(op.team, member, work, rows)
    first, last = chunk(op.team, member, work, rows)
    while last > first:
        for row in range(first + shift, last + shift):
            source = op.residual + 4 * op.stride * (int64_at(op.selected)[row] if op.selected else row)
            status |= rms_norm(float32_at(source), int32_at(source), op.columns, float32_at(op.weight), float64_at(op.eps)[0],
                               float32_at(target.values + 4 * target.stride * row))
            if target.x and not status:
                status |= _quantize_row(target, row)
        first, last = chunk(op.team, member, work, rows)
    if status:
        atomic_or(op.status, status)


@operation
def quantize_operation(member, where):
    """Quantises the rows of ``target`` of a record NORM, which are float32 already."""
    op = carray(_norm_at(where), 1)[0]
    target, work = carray(activation_at(op.target), 1)[0], carray(work_at(op.work), 1)[0]
    rows, status = int64_at(op.rows)[0], 0
    begin(op.team, member, work, rows)
    first, last = chunk(op.team, member, work, rows)
    while last > first:
        for row in range(first, last):
            status |= _quantize_row(target, row)
        first, last = chunk(op.team, member, work, rows)
    if status:
        atomic_or(op.status, status)


@njit(cache=True)
def _quantized_row(op, row, out):
    """(value * factor) for a row of a table of kind ``halves`` or ``nibble``, whose row scale is 1."""
    lane, tile = row % _LANES, op.data + row // _LANES * op.tile_bytes
    half = int8.STEPS // 2 if op.form == INT4 else int8.STEPS
    for group in range((op.columns + GROUP - 1) // GROUP):
        line = tile + group // 2 * (1 + 2 * half) * coded.BYTES
        factor = half_value(uint16_at(line)[group % 2 * _LANES + lane])
        values = int8_at(line + coded.BYTES * (1 + group % 2 * half))
        for i in range(min(GROUP, op.columns - group * GROUP)):
            step, place = i // 8 * 2 + i % 2, lane * 4 + i % 8 // 2
            if op.form == INT4:
                value = (np.int32(values[step // 2 * coded.BYTES + place]) >> (4 * (step % 2)) & 15) - 8
            else:
                value = (np.int32(values[step * coded.BYTES + place]) & 255) - 128
            out[group * GROUP + i] = np.float32(value) * factor


@operation
def embedding_operation(member, where):
    """out[r] = row tokens[r] of a table of which ``held`` rows from ``first`` on are here; zeros for a token of another rank."""
    op = carray(_embedding_at(where), 1)[0]
    work, rows, tokens = carray(work_at(op.work), 1)[0], int64_at(op.rows)[0], int32_at(op.tokens)
    begin(op.team, member, work, rows)
    first, last = chunk(op.team, member, work, rows)
    while last > first:
        for r in range(first, last):
            row, out = tokens[r] - op.first, float32_at(op.out + 4 * op.stride * r)
            if row < 0 or row >= op.held:
                for k in range(op.columns):
                    out[k] = np.float32(0)
            elif op.form == INT8 or op.form == INT4:
                _quantized_row(op, row, out)
            else:
                at = row // _LANES * op.columns * _LANES + row % _LANES
                for k in range(op.columns):
                    place = at + k * _LANES
                    out[k] = half_value(uint16_at(op.data)[place]) if op.form == FLOAT16 else float32_at(op.data)[place]
        first, last = chunk(op.team, member, work, rows)
