"""Attention over a paged KV cache on the CPU, canonical: one definition for prefill, decode, chunks and any cut.

The pools of the cache are those of ``kv_store``. Attention blocks of 256 positions start at absolute multiples of 256. Each
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
from .activations import activation_at
from .elementwise import quantize_group
from .functions import exp
from .memory import atomic_or, float32_at, int8_at, int32_at, int64_at, record, record_pointer, uint16_at
from .operation import operation
from .simd import LANES, load, multiply, rint, store
from .simd_attention import merge_blocks, score_pages, shifted, weigh_scores, weigh_values
from .team import SCRATCH, begin, chunk, member_words, work_at

RUN = 4                         # rows of a run, at most
PAGES = ATTENTION_BLOCK // PAGE
NOWHERE = np.float32(-np.inf)  # the maximum of a block in which a query sees nothing

# runs: int32 [run_count, 2], first row and number of rows; head_starts: int32 [kv_heads + 1], the first query head of each KV
# head; window: visible positions, 0 for all; run_count: an int64; scale: a float32; target: a record ACTIVATION; scratch: bytes
# into the member's scratch; the others as in ``kv_store.STORE``.
ATTENTION = record("team", "status", "work", "runs", "run_count", "q", "q_stride", "keys", "values", "pages", "pages_stride",
                   "sequences", "positions", "head_starts", "kv_heads", "head_dim", "window", "scale", "target", "scratch",
                   "key_scales", "value_scales")


@intrinsic
def _attention_at(typing_context, where):
    return record_pointer(ATTENTION)


def scratch_bytes(max_seq_len: int, head_dim: int, heads_per_kv: int) -> int:
    """Scratch that a thread needs for sequences of ``max_seq_len`` and at most ``heads_per_kv`` query heads of a KV head."""
    return int(places(-(-max_seq_len // ATTENTION_BLOCK), head_dim, RUN * heads_per_kv)[-1])


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
def places(blocks, head_dim, count):
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
def visible(position, window, block):
    """The positions of a block that a query at ``position`` sees, by their number in the block: first and last + 1."""
    low, start = max(0, position + 1 - window) if window > 0 else 0, block * ATTENTION_BLOCK
    return max(low - start, 0), min(position + 1 - start, ATTENTION_BLOCK)


@njit(cache=True)
def gather(q, stride, rows, heads, head_dim, queries):
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
        factors, slot = load(uint16_at(scales), table[page] * kv_heads * PAGE), page % PAGES * PAGE
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
def weigh_block(op, kv_head, pools, table, position, rows, heads, block, queries, scores, maxima, sums):
    """Weights of one block for a run, in place of the scores, and their float32 maxima and sums [queries], row by row and head by
    head. pools: keys and values of the KV head, each with the elements from page to page."""
    keys, key_stride, values, value_stride = pools
    count, page, window = rows * heads, block * PAGES, op.window
    low, high = visible(position, window, block)[0], visible(position + rows - 1, window, block)[1]
    first, last = page + low // PAGE, page + (high - 1) // PAGE
    score_pages(float32_at(queries), count, op.head_dim, keys, key_stride, values, value_stride, table, first, last,
                float32_at(op.scale)[0], float32_at(scores))
    if op.key_scales:
        _scale(float32_at(scores), count, table, op.key_scales + 2 * kv_head * PAGE, op.kv_heads, first, last)
    maximum, total = float32_at(maxima), float32_at(sums)
    for query in range(count):
        low, high = visible(position + query // heads, window, block)
        if low < high:
            maximum[query], whole = weigh_scores(float32_at(scores + 4 * query * ATTENTION_BLOCK), low, high)
            total[query] = np.float32(np.float64(whole) * UNFIXED)
        else:
            maximum[query], total[query] = NOWHERE, np.float32(0)
    return first, last


@njit(cache=True)
def attend_block(op, kv_head, pools, table, ahead, position, rows, heads, width, block, queries, scores, maxima, sums, chains):
    """One block for a run: as ``weigh_block``, and chains float32 [queries, width]. ahead: what ``weigh_values`` asks for."""
    count, window = rows * heads, op.window
    first, last = weigh_block(op, kv_head, pools, table, position, rows, heads, block, queries, scores, maxima, sums)
    chain = float32_at(chains)
    if op.value_scales:
        _scale(float32_at(scores), count, table, op.value_scales + 2 * kv_head * PAGE, op.kv_heads, first, last)
    for i in range(count * width):
        chain[i] = np.float32(0)
    # What all rows see is read once for all, between what only earlier rows see (of a window) and what only later ones see.
    low, high = visible(position + rows - 1, window, block)[0], visible(position, window, block)[1]
    low, high = (low, high) if low < high else (ATTENTION_BLOCK, ATTENTION_BLOCK)
    for r in range(rows):
        first, last = visible(position + r, window, block)
        _weigh(pools, table, ahead, block, r * heads, heads, width, first, min(last, low), scores, chains)
    # Not a bare 0: Numba would compile the function again for a literal.
    _weigh(pools, table, ahead, block, np.int64(0), count, width, low, high, scores, chains)
    for r in range(rows):
        first, last = visible(position + r, window, block)
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
def finish_head(target, row, head, head_dim, chain):
    """Moves the output of one head to its place in the activations ``target``, and quantises it; returns a kernel status."""
    out, status = float32_at(target.values + 4 * (row * target.stride + head * head_dim)), OK
    for d in range(head_dim):
        out[d] = chain[d]
    if target.x:
        for group in range(head * target.per_block, (head + 1) * target.per_block):
            status |= quantize_group(target, row, group)
    return status


@njit(cache=True)
def _first_block(position, window):
    """The first attention block of which a query at ``position`` sees something."""
    return max(0, position + 1 - window) // ATTENTION_BLOCK if window > 0 else 0


@njit(cache=True)
def _next_task(op, run, kv_head, sequence, last_block, first_block, last_page):
    """What is read behind a run's last block: the KV head, how many pages on, and the last page there, as the run's page table
    counts them. It is the run's first block for the next KV head, or that of the next run (tables of sequences are one array)."""
    if kv_head + 1 < op.kv_heads:
        return kv_head + 1, (first_block - last_block) * PAGES, last_page
    if run + 1 == int64_at(op.run_count)[0]:
        return kv_head, np.int64(0), last_page
    row, rows = int32_at(op.runs)[2 * run + 2], int32_at(op.runs)[2 * run + 3]
    position, tables = int32_at(op.positions)[row], (int32_at(op.sequences)[row] - sequence) * op.pages_stride
    further = tables + (_first_block(position, op.window) - last_block) * PAGES
    return 0, further, tables + (position + rows - 1) // PAGE


@njit(cache=True)
def _run(op, keys, values, target, run, kv_head, scratch):
    """All query heads of one KV head for one run; returns a kernel status."""
    row, rows, head = int32_at(op.runs)[2 * run], int32_at(op.runs)[2 * run + 1], int32_at(op.head_starts)[kv_head]
    heads, position, head_dim = int32_at(op.head_starts)[kv_head + 1] - head, int32_at(op.positions)[row], op.head_dim
    if heads == 0:
        return OK
    first, sequence = _first_block(position, op.window), int32_at(op.sequences)[row]
    blocks = (position + rows - 1) // ATTENTION_BLOCK + 1 - first
    count, width = rows * heads, (head_dim + LANES - 1) // LANES * LANES
    queries, maxima, sums, totals, largest, chains, _ = places(blocks, head_dim, count)
    gather(op.q + 4 * (row * op.q_stride + head * head_dim), op.q_stride, rows, heads, head_dim, scratch + queries)
    table, last_page = int32_at(op.pages + 4 * sequence * op.pages_stride), (position + rows - 1) // PAGE
    own = shifted(keys, kv_head * head_dim * PAGE)
    pools = own, op.kv_heads * head_dim * PAGE, shifted(values, kv_head * width * PAGE), op.kv_heads * width * PAGE
    for b in range(blocks):
        # What comes next: the keys of the next block, or of the next task's first one.
        ahead = own, np.int64(PAGES), last_page
        if b + 1 == blocks:
            head_then, further, furthest = _next_task(op, run, kv_head, sequence, first + b, first, last_page)
            ahead = shifted(keys, head_then * head_dim * PAGE), further, furthest
        attend_block(op, kv_head, pools, table, ahead, position, rows, heads, width, first + b, scratch + queries, scratch,
                     scratch + maxima + 4 * b * count, scratch + sums + 4 * b * count, scratch + chains + 4 * b * count * width)
    weights, total = float32_at(scratch + maxima), int64_at(scratch + totals)
    _weigh_blocks(weights, float32_at(scratch + sums), blocks, count, float32_at(scratch + largest), total)
    status = OK
    for query in range(count):
        chain, divisor = float32_at(scratch + chains + 4 * query * width), np.float32(np.float64(total[query]) * UNFIXED)
        if merge_blocks(chain, shifted(weights, query), blocks, count * width, count, head_dim, divisor):
            status |= finish_head(target, row + query // heads, head + query % heads, head_dim, chain)
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
