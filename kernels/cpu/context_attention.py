"""Attention whose positions are dealt out to the ranks of a context group, in three operations with exchanges between them.

A rank holds the attention blocks ``b`` of a sequence for which (b + the rank of its first block) % ranks is its own number, and
works on the query heads of all ranks. ``look`` finds the maximum of every query over the own blocks; the ranks join these. With
the largest one, ``weigh`` makes of every own block what ``attention`` merges: fixed-point sums of its weights and of its weighted
values, which the ranks add. ``finish`` divides, for the own query heads. So the bits are those of ``attention``: a maximum and
sums of integers are the same in any order.

What ``look`` has computed of a block is kept for ``weigh`` where there is room: for all sequences that decode. Of long prompts it
is computed again, as it would take the room of a prompt for each of its rows.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from ..numerics import ATTENTION_BLOCK, BLOCK_LIMIT, FIXED, OK, OUT_OF_RANGE, PAGE, UNFIXED
from .activations import activation_at
from .attention import NOWHERE, PAGES, attend_block, finish_head, gather, places, weigh_block
from .functions import exp
from .memory import atomic_or, float32_at, int8_at, int32_at, int64_at, record, record_pointer, uint16_at
from .operation import operation
from .simd import LANES, bits_of, float_from_bits, rint
from .simd_attention import shifted
from .team import SCRATCH, begin, chunk, member_words, work_at

# As ``attention.ATTENTION``, with q of the ``heads`` query heads of the group, and: weighs: 0 for ``look``, 1 for ``weigh``;
# ranks, rank; first_parts: int32 [sequences], the rank that holds a sequence's first block; kept: float32, room for what ``look``
# leaves to ``weigh``; kept_at: int64 [run_count], see ``keep``; maxima: int64 [rows, heads], what ``look`` finds; parts: int64
# addresses [part_count] of what is left to join of such arrays; sums: int64 [rows, heads, head_dim + 1], what ``weigh`` finds: of
# values, and last of weights.
CONTEXT = record("team", "status", "work", "runs", "run_count", "q", "keys", "values", "pages", "pages_stride", "sequences",
                 "positions", "head_starts", "kv_heads", "heads", "head_dim", "window", "scale", "scratch", "key_scales",
                 "value_scales", "ranks", "rank", "first_parts", "weighs", "kept", "kept_at", "maxima", "parts", "part_count",
                 "sums")
# q: float32 [rows, columns]; out: float32 [rows, width], zeros but for these columns from ``first`` on.
PLACE = record("team", "status", "work", "rows", "q", "columns", "out", "width", "first")
# parts: int64 addresses [part_count] of sums like those above, of ``all_heads``; the ``heads`` from ``first`` on are finished.
FINISH = record("team", "status", "work", "rows", "heads", "first", "all_heads", "head_dim", "parts", "part_count", "target")

_MAGNITUDE = np.int32(0x7FFFFFFF)
_LIMIT_BITS = np.int32(BLOCK_LIMIT.view(np.int32))


@intrinsic
def _context_at(typing_context, where):
    return record_pointer(CONTEXT)


@intrinsic
def _place_at(typing_context, where):
    return record_pointer(PLACE)


@intrinsic
def _finish_at(typing_context, where):
    return record_pointer(FINISH)


@njit(cache=True)
def own_blocks(first, last, first_part, ranks, rank):
    """Of the blocks first … last of a sequence the first one that a rank holds, and how many it holds."""
    start = first + (rank - first_part - first) % ranks
    return start, max(0, (last - start) // ranks + 1)


@njit(cache=True)
def keep(runs, count, sequences, positions, first_parts, ranks, rank, room, kept_at):
    """Deals out room for ``room`` pairs of a row and an own block: for each run, where its part begins, or -1. Returns how many
    pairs found none."""
    used = left_out = 0
    for run in range(count):
        row, rows = runs[run, 0], runs[run, 1]
        last = (positions[row] + rows - 1) // ATTENTION_BLOCK
        need = rows * own_blocks(0, last, first_parts[sequences[row]], ranks, rank)[1]
        kept_at[run] = used if used + need <= room else -1
        used, left_out = (used + need, left_out) if used + need <= room else (used, left_out + need)
    return left_out


@njit(cache=True)
def _ordered(x):
    """An int64 that orders float32 as their values."""
    bits = bits_of(x)
    return np.int64(bits if bits >= 0 else bits ^ _MAGNITUDE)


@njit(cache=True)
def _value(ordered):
    """The float32 of ``_ordered``."""
    bits = np.int32(ordered)
    return float_from_bits(bits if bits >= 0 else bits ^ _MAGNITUDE)


@njit(cache=True)
def _blocks(op, keys, values, run, kv_head, scratch):
    """Computes the own blocks for a run and the query heads of one KV head, unless ``look`` has left them to ``weigh``.

    Returns the first row, rows, first head, heads, own blocks, and the addresses of maxima and sums [blocks, queries] and chains
    [blocks, queries, width], float32; ``look`` computes no chains where it has no room to keep them.
    """
    row, rows, head = int32_at(op.runs)[2 * run], int32_at(op.runs)[2 * run + 1], int32_at(op.head_starts)[kv_head]
    heads, position, head_dim = int32_at(op.head_starts)[kv_head + 1] - head, int32_at(op.positions)[row], op.head_dim
    sequence, furthest = int32_at(op.sequences)[row], (position + rows - 1) // PAGE
    first = max(0, position + 1 - op.window) // ATTENTION_BLOCK if op.window > 0 else 0
    start, blocks = own_blocks(first, furthest // PAGES, int32_at(op.first_parts)[sequence], op.ranks, op.rank)
    count, width, stride = rows * heads, (head_dim + LANES - 1) // LANES * LANES, op.heads * head_dim
    queries, maxima, sums, _, _, chains, _ = places(blocks, head_dim, count)
    maxima, sums, chains = scratch + maxima, scratch + sums, scratch + chains
    kept = int64_at(op.kept_at)[run] >= 0
    if kept:
        maxima = op.kept + 4 * (2 + width) * (int64_at(op.kept_at)[run] * op.heads + rows * blocks * head)
        sums = maxima + 4 * blocks * count
        chains = sums + 4 * blocks * count
    if blocks == 0 or heads == 0 or (kept and op.weighs):
        return row, rows, head, heads, blocks, maxima, sums, chains
    gather(op.q + 4 * (row * stride + head * head_dim), stride, rows, heads, head_dim, scratch + queries)
    table = int32_at(op.pages + 4 * sequence * op.pages_stride)
    own, following = shifted(keys, kv_head * head_dim * PAGE), shifted(keys, (kv_head + 1) * head_dim * PAGE)
    pools = own, op.kv_heads * head_dim * PAGE, shifted(values, kv_head * width * PAGE), op.kv_heads * width * PAGE
    for b in range(blocks):
        block, m, s = start + b * op.ranks, maxima + 4 * b * count, sums + 4 * b * count
        if kept or op.weighs:
            # As in ``attention``; pages of other ranks that this may ask for are wrong ones, but there.
            ahead = (own, op.ranks * PAGES) if b + 1 < blocks else (following, (1 - blocks) * op.ranks * PAGES)
            attend_block(op, kv_head, pools, table, (*ahead, furthest), position, rows, heads, width, block, scratch + queries,
                         scratch, m, s, chains + 4 * b * count * width)
        else:
            weigh_block(op, kv_head, pools, table, position, rows, heads, block, scratch + queries, scratch, m, s)
    return row, rows, head, heads, blocks, maxima, sums, chains


@njit(cache=True)
def _look(op, keys, values, run, kv_head, scratch):
    """The largest maxima of a run over the own blocks."""
    row, rows, head, heads, blocks, maxima, _, _ = _blocks(op, keys, values, run, kv_head, scratch)
    maximum = float32_at(maxima)
    for query in range(rows * heads):
        largest = NOWHERE
        for b in range(blocks):
            largest = max(largest, maximum[b * rows * heads + query])
        int64_at(op.maxima)[(row + query // heads) * op.heads + head + query % heads] = _ordered(largest)


@njit(cache=True)
def _add(chain, weight, head_dim, sums):
    """sums[:head_dim] += weight * chain as fixed point; whether all terms were within a block value's range."""
    bits = np.int32(0)
    for d in range(head_dim):
        value = chain[d] * weight
        bits = max(bits, bits_of(value) & _MAGNITUDE)
        sums[d] += np.int64(rint(value * FIXED))
    return bits < _LIMIT_BITS


@njit(cache=True)
def _weigh(op, keys, values, run, kv_head, scratch):
    """Sums of a run over the own blocks, relative to the largest maxima of all ranks; returns a kernel status."""
    row, rows, head, heads, blocks, maxima, sums, chains = _blocks(op, keys, values, run, kv_head, scratch)
    maximum, total, count, head_dim, within = float32_at(maxima), float32_at(sums), rows * heads, op.head_dim, True
    width = (head_dim + LANES - 1) // LANES * LANES
    for query in range(count):
        place = (row + query // heads) * op.heads + head + query % heads
        largest, out = int64_at(int64_at(op.parts)[0])[place], int64_at(op.sums + 8 * place * (head_dim + 1))
        for part in range(1, op.part_count):
            largest = max(largest, int64_at(int64_at(op.parts)[part])[place])
        for i in range(head_dim + 1):
            out[i] = 0
        for b in range(blocks):
            weight = exp(maximum[b * count + query] - _value(largest))
            out[head_dim] += np.int64(rint((total[b * count + query] * weight) * FIXED))
            within &= _add(float32_at(chains + 4 * (b * count + query) * width), weight, head_dim, out)
    return OK if within else OUT_OF_RANGE


@njit(cache=True)
def _over_runs(member, op, keys, values):
    """Tasks: runs x KV heads."""
    work = carray(work_at(op.work), 1)[0]
    scratch = int64_at(member_words(op.team, member))[SCRATCH] + op.scratch
    total, status = int64_at(op.run_count)[0] * op.kv_heads, 0
    begin(op.team, member, work, total)
    first, last = chunk(op.team, member, work, total)
    while last > first:
        for task in range(first, last):
            run, kv_head = task // op.kv_heads, task % op.kv_heads
            if op.weighs:
                status |= _weigh(op, keys, values, run, kv_head, scratch)
            else:
                _look(op, keys, values, run, kv_head, scratch)
        first, last = chunk(op.team, member, work, total)
    if status:
        atomic_or(op.status, status)


@operation
def context_operation(member, where):
    """``look`` or ``weigh`` over pools of float16 bits."""
    op = carray(_context_at(where), 1)[0]
    _over_runs(member, op, uint16_at(op.keys), uint16_at(op.values))


@operation
def float32_context_operation(member, where):
    """``look`` or ``weigh`` over float32 pools."""
    op = carray(_context_at(where), 1)[0]
    _over_runs(member, op, float32_at(op.keys), float32_at(op.values))


@operation
def int8_context_operation(member, where):
    """``look`` or ``weigh`` over pools of int8, with scales."""
    op = carray(_context_at(where), 1)[0]
    _over_runs(member, op, int8_at(op.keys), int8_at(op.values))


@operation
def place_operation(member, where):
    """Puts the own queries between zeros: the ranks' bits are added. Tasks: rows."""
    op = carray(_place_at(where), 1)[0]
    work, total = carray(work_at(op.work), 1)[0], int64_at(op.rows)[0]
    begin(op.team, member, work, total)
    first, last = chunk(op.team, member, work, total)
    while last > first:
        for row in range(first, last):
            q, out = float32_at(op.q + 4 * row * op.columns), float32_at(op.out + 4 * row * op.width)
            for i in range(op.width):
                out[i] = np.float32(0)
            for i in range(op.columns):
                out[op.first + i] = q[i]
        first, last = chunk(op.team, member, work, total)


@njit(cache=True, error_model="numpy")
def _divide(op, target, row, head):
    """One query head of one row from the sums of all parts; returns a kernel status."""
    size = op.head_dim + 1
    at, total = 8 * (row * op.all_heads + op.first + head) * size, np.int64(0)
    out = float32_at(target.values + 4 * (row * target.stride + head * op.head_dim))
    for part in range(op.part_count):
        total += int64_at(int64_at(op.parts)[part] + at)[op.head_dim]
    divisor = np.float32(np.float64(total) * UNFIXED)
    for d in range(op.head_dim):
        total = np.int64(0)
        for part in range(op.part_count):
            total += int64_at(int64_at(op.parts)[part] + at)[d]
        out[d] = np.float32(np.float64(total) * UNFIXED) / divisor
    return finish_head(target, row, head, op.head_dim, out)


@operation
def finish_operation(member, where):
    """Attention of the own query heads, quantised too, from the sums of all ranks. Tasks: rows x heads."""
    op = carray(_finish_at(where), 1)[0]
    target, work = carray(activation_at(op.target), 1)[0], carray(work_at(op.work), 1)[0]
    total, status = int64_at(op.rows)[0] * op.heads, 0
    begin(op.team, member, work, total)
    first, last = chunk(op.team, member, work, total)
    while last > first:
        for task in range(first, last):
            status |= _divide(op, target, task // op.heads, task % op.heads)
        first, last = chunk(op.team, member, work, total)
    if status:
        atomic_or(op.status, status)
