"""What attention begins with: norm and rotation of queries and keys, and where keys and values are kept. Canonical.

The cache holds pages of 16 positions: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads, 16, padded head_dim],
float16 bits (uint16), float32, or int8 with a scale for each position and KV head, float16 bits [pages, kv_heads, 16]. The key or
value of one head is quantised by itself (``reference.quantize_heads``), whatever is stored beside it.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from ..numerics import ATTENTION_BLOCK, OK, OUT_OF_RANGE, PAGE
from .elementwise import largest_magnitude, rms_norm
from .functions import half_bits, half_value
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
from .simd import LANES, float_from_bits, fma_scalar, rint
from .team import begin, chunk, work_at

# q, k, v: float32 [rows, stride], q and k changed in place; sequences, positions: int32 [rows]; cosines, sines: float32
# [positions, head_dim / 2]; pages: int32 [sequences, pages_stride]; q_norm, k_norm: float32 [head_dim], or 0; rows: an int64;
# eps: a float64. half: whether the pools hold float16 bits; they hold int8 where there are key_scales and value_scales, uint16.
# ranks, rank, first_parts: as in ``context_attention``, where blocks of positions are dealt out to several ranks; else 0.
STORE = record("team", "status", "work", "rows", "q", "k", "v", "q_stride", "k_stride", "v_stride", "cosines", "sines",
               "sequences", "positions", "pages", "pages_stride", "keys", "values", "heads", "kv_heads", "head_dim", "q_norm",
               "k_norm", "eps", "half", "key_scales", "value_scales", "ranks", "rank", "first_parts")


@intrinsic
def _store_at(typing_context, where):
    return record_pointer(STORE)


@njit(cache=True)
def _norm_and_rotate(op, row, where, norm):
    """One head at an address: RMS norm if there is one, then RoPE (Su et al. 2021; half-split pairs); returns a kernel status."""
    status, half = OK, op.head_dim // 2
    if norm:
        x = float32_at(where)
        status = rms_norm(x, int32_at(where), op.head_dim, float32_at(norm), float64_at(op.eps)[0], x)
    at = 4 * half * int32_at(op.positions)[row]
    cosines, sines = float32_at(op.cosines + at), float32_at(op.sines + at)
    first, second = float32_at(where), float32_at(where + 4 * half)
    for i in range(half):
        a, b = first[i], second[i]
        first[i] = fma_scalar(-b, sines[i], a * cosines[i])
        second[i] = fma_scalar(a, sines[i], b * cosines[i])
    return status


@njit(cache=True)
def _store_half(source, target, stride, count):
    """target[i * stride] = float16 bits of source[i]; returns OUT_OF_RANGE where they are not finite."""
    beyond = False
    for i in range(count):
        bits = half_bits(source[i])
        beyond |= bits & np.uint16(0x7C00) == np.uint16(0x7C00)
        target[i * stride] = bits
    return OUT_OF_RANGE if beyond else OK


@njit(cache=True, error_model="numpy")
def _store_int8(source, bits, target, stride, count, scale):
    """target[i * stride] = rint(source[i] / scale) and the scale: ``reference.quantize_heads``; returns a kernel status.

    ``bits`` is the source seen as int32, ``scale`` points to float16 bits.
    """
    exact = float_from_bits(largest_magnitude(bits, 0, count)) / np.float32(127)
    nearest = half_bits(exact)
    scale[0] = nearest + np.uint16(half_value(nearest) < exact)
    known = half_value(scale[0])
    inverse = np.float32(1) / known if known > 0 else np.float32(0)
    for i in range(count):
        target[i * stride] = np.int32(rint(source[i] * inverse))
    return OUT_OF_RANGE if scale[0] >= np.uint16(0x7C00) else OK


@njit(cache=True)
def _elsewhere(op, row):
    """Whether another rank holds the row's position."""
    if op.ranks <= 1:
        return False
    block = int32_at(op.positions)[row] // ATTENTION_BLOCK
    return (block + int32_at(op.first_parts)[int32_at(op.sequences)[row]]) % op.ranks != op.rank


@njit(cache=True)
def _store_head(op, row, kv_head, k, v):
    """One row's key and value of one KV head, at addresses, go to their page; returns a kernel status."""
    position, head_dim = int32_at(op.positions)[row], op.head_dim
    page = int32_at(op.pages)[int32_at(op.sequences)[row] * op.pages_stride + position // PAGE]
    head, slot, width = page * op.kv_heads + kv_head, position % PAGE, (head_dim + LANES - 1) // LANES * LANES
    key, value = head * head_dim * PAGE + slot, (head * PAGE + slot) * width
    if op.key_scales:
        at = 2 * (head * PAGE + slot)
        return (_store_int8(float32_at(k), int32_at(k), int8_at(op.keys + key), PAGE, head_dim, uint16_at(op.key_scales + at))
                | _store_int8(float32_at(v), int32_at(v), int8_at(op.values + value), 1, head_dim,
                              uint16_at(op.value_scales + at)))
    if op.half:
        return (_store_half(float32_at(k), uint16_at(op.keys + 2 * key), PAGE, head_dim)
                | _store_half(float32_at(v), uint16_at(op.values + 2 * value), 1, head_dim))
    keys, values = float32_at(op.keys + 4 * key), float32_at(op.values + 4 * value)
    for d in range(head_dim):
        keys[d * PAGE], values[d] = float32_at(k)[d], float32_at(v)[d]
    return OK


@operation
def store_operation(member, where):
    """Norm and RoPE of every row's queries and keys; keys and values to their pages. Tasks: rows x (query and KV heads)."""
    op = carray(_store_at(where), 1)[0]
    work, heads, status = carray(work_at(op.work), 1)[0], op.heads + op.kv_heads, 0
    total = int64_at(op.rows)[0] * heads
    begin(op.team, member, work, total)
    first, last = chunk(op.team, member, work, total)
    while last > first:
        for task in range(first, last):
            row, head = task // heads, task % heads
            if head < op.heads:
                status |= _norm_and_rotate(op, row, op.q + 4 * (row * op.q_stride + head * op.head_dim), op.q_norm)
            elif not _elsewhere(op, row):
                head -= op.heads
                k = op.k + 4 * (row * op.k_stride + head * op.head_dim)
                v = op.v + 4 * (row * op.v_stride + head * op.head_dim)
                status |= _norm_and_rotate(op, row, k, op.k_norm)
                status |= _store_head(op, row, head, k, v)
        first, last = chunk(op.team, member, work, total)
    if status:
        atomic_or(op.status, status)
