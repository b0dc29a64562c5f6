"""Attention over a paged KV cache on the CPU, canonical: one definition for prefill, decode, chunks and any cut.

The cache holds pages of 16 positions: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads, 16, padded
head_dim], float16 bits (uint16), float32, or int8 with a scale for each position and KV head, float16 bits [pages, kv_heads, 16]
(see ``reference.quantize_heads``). Attention blocks of 256 positions start at absolute multiples of 256. Each
block yields its own maximum, its sum of weights as an integer, and chains of weighted values in ascending position;
blocks are merged as 64-bit fixed point, so neither order nor ownership of blocks changes a bit (the online softmax of
Milakov & Gimelshein 2018, made exact).

The chain of a score runs over what is stored; it is multiplied by the scale of softmax, then by that of an int8 key. The scale of
an int8 value multiplies the position's weight, when the block's weights have been summed.

Queries are taken by runs: up to four rows of one sequence at consecutive positions, with all query heads that read one KV head.
What all of them see is loaded once for all; the few positions that only some rows of a run see follow row by row.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from ..numerics import ATTENTION_BLOCK, FIXED, OK, OUT_OF_RANGE, PAGE, UNFIXED
from . import simd
from .activations import activation_at
from .elementwise import largest_magnitude, quantize_group, rms_norm
from .functions import exp, half_bits, half_value
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
from .simd import float_from_bits, fma_scalar, load, multiply, rint, store
from .simd_attention import merge_blocks, score_pages, shifted, weigh_scores, weigh_values
from .team import SCRATCH, begin, chunk, member_words, work_at

LANES = simd.LANES
RUN = 4                         # rows of a run, at most
_PAGES = ATTENTION_BLOCK // PAGE
_NOWHERE = np.float32(-np.inf)  # the maximum of a block in which a query sees nothing

# q, k, v: float32 [rows, stride], q and k changed in place; sequences, positions: int32 [rows]; cosines, sines: float32
# [positions, head_dim / 2]; pages: int32 [sequences, pages_stride]; q_norm, k_norm: float32 [head_dim], or 0; rows: an int64;
# eps: a float64. half: whether the pools hold float16 bits; they hold int8 where there are key_scales and value_scales, uint16.
STORE = record("team", "status", "work", "rows", "q", "k", "v", "q_stride", "k_stride", "v_stride", "cosines", "sines",
               "sequences", "positions", "pages", "pages_stride", "keys", "values", "heads", "kv_heads", "head_dim", "q_norm",
               "k_norm", "eps", "half", "key_scales", "value_scales")
# runs: int32 [run_count, 2], first row and number of rows; head_starts: int32 [kv_heads + 1], the first query head of each KV
# head; window: visible positions, 0 for all; run_count: an int64; scale: a float32; target: a record ACTIVATION; scratch: bytes
# into the member's scratch; key_scales, value_scales: uint16 of int8 pools, else 0.
ATTENTION = record("team", "status", "work", "runs", "run_count", "q", "q_stride", "keys", "values", "pages", "pages_stride",
                   "sequences", "positions", "head_starts", "kv_heads", "head_dim", "window", "scale", "target", "scratch",
                   "key_scales", "value_scales")


@intrinsic
def _store_at(typing_context, where):
    return record_pointer(STORE)


@intrinsic
def _attention_at(typing_context, where):
    return record_pointer(ATTENTION)


def padded_head_dim(head_dim: int) -> int:
    """head_dim rounded up to whole vectors: the row length of the value pool."""
    return -(-head_dim // LANES) * LANES


def scratch_bytes(max_seq_len: int, head_dim: int, heads_per_kv: int) -> int:
    """Scratch that a thread needs for sequences of ``max_seq_len`` and at most ``heads_per_kv`` query heads of a KV head."""
    return int(_places(-(-max_seq_len // ATTENTION_BLOCK), head_dim, RUN * heads_per_kv)[-1])


@njit(cache=True)
def runs_of(sequences, positions, rows, runs):
    """Cuts ``rows`` rows into runs, int32 [rows, 2] at most; returns their number."""
    count, row = 0, 0
    while row < rows:
        stop = row + 1
        while stop < min(rows, row + RUN) and sequences[stop] == sequences[row] and positions[stop] == positions[stop - 1] + 1:
            stop += 1
        runs[count, 0], runs[count, 1] = row, stop - row
        row, count = stop, count + 1
    return count


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
            else:
                head -= op.heads
                k = op.k + 4 * (row * op.k_stride + head * op.head_dim)
                v = op.v + 4 * (row * op.v_stride + head * op.head_dim)
                status |= _norm_and_rotate(op, row, k, op.k_norm)
                status |= _store_head(op, row, head, k, v)
        first, last = chunk(op.team, member, work, total)
    if status:
        atomic_or(op.status, status)


@njit(cache=True)
def _places(blocks, head_dim, count):
    """Byte offsets in the scratch of a task with ``count`` queries, and its size.

    Scores [count, 256], queries [head_dim, count], maxima and sums [blocks, count], totals int64 [count], largest maxima
    [count], chains [blocks, count, width]; float32 but for the totals.
    """
    width = (head_dim + LANES - 1) // LANES * LANES
    queries = 4 * count * ATTENTION_BLOCK
    maxima = queries + 4 * head_dim * count
    sums = maxima + 4 * blocks * count
    totals = (sums + 4 * blocks * count + 63) // 64 * 64
    largest = totals + 8 * count
    chains = (largest + 4 * count + 63) // 64 * 64
    return queries, maxima, sums, totals, largest, chains, chains + 4 * blocks * count * width


@njit(cache=True)
def _visible(position, window, block):
    """The positions of a block that a query at ``position`` sees, by their number in the block: first and last + 1."""
    low, start = max(0, position + 1 - window) if window > 0 else 0, block * ATTENTION_BLOCK
    return max(low - start, 0), min(position + 1 - start, ATTENTION_BLOCK)


@njit(cache=True)
def _gather(q, stride, rows, heads, head_dim, queries):
    """The run's queries, transposed: float32 [head_dim, rows * heads]."""
    for r in range(rows):
        for h in range(heads):
            source, target = float32_at(q + 4 * (r * stride + h * head_dim)), float32_at(queries + 4 * (r * heads + h))
            for d in range(head_dim):
                target[d * rows * heads] = source[d]


@njit(cache=True)
def _scale(scores, count, table, scales, kv_heads, first, last):
    """Multiplies scores, or weights, of ``count`` queries in the pages first … last of a block by the scales of the positions.

    ``scales``: an address, where the first page keeps those of the KV head.
    """
    for page in range(first, last + 1):
        factors, slot = load(uint16_at(scales), table[page] * kv_heads * PAGE), page % _PAGES * PAGE
        for query in range(count):
            at = query * ATTENTION_BLOCK + slot
            store(scores, at, multiply(load(scores, at), factors))


@njit(cache=True)
def _weigh(pools, table, ahead, block, query, count, width, low, high, scores, chains):
    """Values of positions low … high - 1 of a block for ``count`` queries from ``query`` on."""
    _, key_stride, values, value_stride = pools
    next_keys, further, furthest = ahead
    weigh_values(float32_at(scores + 4 * query * ATTENTION_BLOCK), count, values, value_stride, width, next_keys, key_stride,
                 table, further, furthest, block * ATTENTION_BLOCK + low, block * ATTENTION_BLOCK + high,
                 float32_at(chains + 4 * query * width))


@njit(cache=True)
def _block(op, kv_head, pools, table, ahead, position, rows, heads, width, block, queries, scores, maxima, sums, chains):
    """One block for a run: float32 maxima, sums [queries] and chains [queries, width], row by row and head by head.

    pools: keys and values of the KV head, each with the elements from page to page; ahead: what ``weigh_values`` asks for.
    """
    keys, key_stride, values, value_stride = pools
    count, page, window = rows * heads, block * _PAGES, op.window
    low, high = _visible(position, window, block)[0], _visible(position + rows - 1, window, block)[1]
    first, last = page + low // PAGE, page + (high - 1) // PAGE
    score_pages(float32_at(queries), count, op.head_dim, keys, key_stride, values, value_stride, table, first, last,
                float32_at(op.scale)[0], float32_at(scores))
    scales_at = 2 * kv_head * PAGE
    if op.key_scales:
        _scale(float32_at(scores), count, table, op.key_scales + scales_at, op.kv_heads, first, last)
    maximum, total, chain = float32_at(maxima), float32_at(sums), float32_at(chains)
    for query in range(count):
        low, high = _visible(position + query // heads, window, block)
        if low < high:
            maximum[query], whole = weigh_scores(float32_at(scores + 4 * query * ATTENTION_BLOCK), low, high)
            total[query] = np.float32(np.float64(whole) * UNFIXED)
        else:
            maximum[query], total[query] = _NOWHERE, np.float32(0)
    if op.value_scales:
        _scale(float32_at(scores), count, table, op.value_scales + scales_at, op.kv_heads, first, last)
    for i in range(count * width):
        chain[i] = np.float32(0)
    # What all rows see is read once for all, between what only earlier rows see (of a window) and what only later ones see.
    low, high = _visible(position + rows - 1, window, block)[0], _visible(position, window, block)[1]
    low, high = (low, high) if low < high else (ATTENTION_BLOCK, ATTENTION_BLOCK)
    for r in range(rows):
        first, last = _visible(position + r, window, block)
        _weigh(pools, table, ahead, block, r * heads, heads, width, first, min(last, low), scores, chains)
    # Not a bare 0: Numba would compile the function again for a literal.
    _weigh(pools, table, ahead, block, np.int64(0), count, width, low, high, scores, chains)
    for r in range(rows):
        first, last = _visible(position + r, window, block)
        _weigh(pools, table, ahead, block, r * heads, heads, width, max(first, high), last, scores, chains)


@njit(cache=True)
def _weigh_blocks(maxima, sums, blocks, count, largest, totals):
    """Maxima [blocks, count] become the blocks' weights relative to the largest; totals int64 [count]: weighted sums."""
    for query in range(count):
        largest[query], totals[query] = maxima[query], 0
    for b in range(1, blocks):
        for query in range(count):
            largest[query] = max(largest[query], maxima[b * count + query])
    for b in range(blocks):
        for query in range(count):
            weight = exp(maxima[b * count + query] - largest[query])
            maxima[b * count + query] = weight
            totals[query] += np.int64(rint((sums[b * count + query] * weight) * FIXED))


@njit(cache=True)
def _finish(target, row, head, head_dim, chain):
    """Moves the output of one head to its place in the activations ``target``, and quantises it; returns a kernel status."""
    out, status = float32_at(target.values + 4 * (row * target.stride + head * head_dim)), OK
    for d in range(head_dim):
        out[d] = chain[d]
    if target.x:
        for group in range(head * target.per_block, (head + 1) * target.per_block):
            status |= quantize_group(target, row, group)
    return status


@njit(cache=True)
def _run(op, keys, values, target, run, kv_head, scratch):
    """All query heads of one KV head for one run; returns a kernel status."""
    row, rows, head = int32_at(op.runs)[2 * run], int32_at(op.runs)[2 * run + 1], int32_at(op.head_starts)[kv_head]
    heads, position, head_dim = int32_at(op.head_starts)[kv_head + 1] - head, int32_at(op.positions)[row], op.head_dim
    if heads == 0:
        return OK
    first = max(0, position + 1 - op.window) // ATTENTION_BLOCK if op.window > 0 else 0
    blocks = (position + rows - 1) // ATTENTION_BLOCK + 1 - first
    count, width = rows * heads, (head_dim + LANES - 1) // LANES * LANES
    queries, maxima, sums, totals, largest, chains, _ = _places(blocks, head_dim, count)
    _gather(op.q + 4 * (row * op.q_stride + head * head_dim), op.q_stride, rows, heads, head_dim, scratch + queries)
    table = int32_at(op.pages + 4 * int32_at(op.sequences)[row] * op.pages_stride)
    own, following = shifted(keys, kv_head * head_dim * PAGE), shifted(keys, (kv_head + 1) * head_dim * PAGE)
    pools = own, op.kv_heads * head_dim * PAGE, shifted(values, kv_head * width * PAGE), op.kv_heads * width * PAGE
    for b in range(blocks):
        # What comes next: the keys of the next block, or of the first one for the next KV head.
        next_keys, further = (own, _PAGES) if b + 1 < blocks else (following, (1 - blocks) * _PAGES)
        _block(op, kv_head, pools, table, (next_keys, further, (position + rows - 1) // PAGE), position, rows, heads, width,
               first + b, scratch + queries, scratch, scratch + maxima + 4 * b * count, scratch + sums + 4 * b * count,
               scratch + chains + 4 * b * count * width)
    weights, total = float32_at(scratch + maxima), int64_at(scratch + totals)
    _weigh_blocks(weights, float32_at(scratch + sums), blocks, count, float32_at(scratch + largest), total)
    status = OK
    for query in range(count):
        chain, divisor = float32_at(scratch + chains + 4 * query * width), np.float32(np.float64(total[query]) * UNFIXED)
        if merge_blocks(chain, shifted(weights, query), blocks, count * width, count, head_dim, divisor):
            status |= _finish(target, row + query // heads, head + query % heads, head_dim, chain)
        else:
            status |= OUT_OF_RANGE
    return status


@njit(cache=True)
def _attention(member, op, keys, values):
    """out = softmax(q keys * scale) values over the positions visible to each row, quantised too. Tasks: runs x KV heads."""
    target, work = carray(activation_at(op.target), 1)[0], carray(work_at(op.work), 1)[0]
    scratch = int64_at(member_words(op.team, member))[SCRATCH] + op.scratch
    total, status = int64_at(op.run_count)[0] * op.kv_heads, 0
    begin(op.team, member, work, total)
    first, last = chunk(op.team, member, work, total)
    while last > first:
        for task in range(first, last):
            status |= _run(op, keys, values, target, task // op.kv_heads, task % op.kv_heads, scratch)
        first, last = chunk(op.team, member, work, total)
    if status:
        atomic_or(op.status, status)


@operation
def attention_operation(member, where):
    """Attention over pools of float16 bits."""
    op = carray(_attention_at(where), 1)[0]
    _attention(member, op, uint16_at(op.keys), uint16_at(op.values))


@operation
def float32_attention_operation(member, where):
    """Attention over float32 pools."""
    op = carray(_attention_at(where), 1)[0]
    _attention(member, op, float32_at(op.keys), float32_at(op.values))


@operation
def int8_attention_operation(member, where):
    """Attention over pools of int8, with scales."""
    op = carray(_attention_at(where), 1)[0]
    _attention(member, op, int8_at(op.keys), int8_at(op.values))
