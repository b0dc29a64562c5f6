"""Attention over a paged KV cache on the CPU, canonical: one definition for prefill, decode, chunks and any cut.

The cache holds pages of 16 positions: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads, 16, padded
head_dim], float16 bits (uint16) or float32. Attention blocks of 256 positions start at absolute multiples of 256. Each
block yields its own maximum, its sum of weights as an integer, and chains of weighted values in ascending position;
blocks are merged as 64-bit fixed point, so neither order nor ownership of blocks changes a bit (the online softmax of
Milakov & Gimelshein 2018, made exact).
"""

import numpy as np
from numba import njit, prange

from ..numerics import ATTENTION_BLOCK, BLOCK_LIMIT, FIXED, OK, OUT_OF_RANGE, PAGE, UNFIXED
from . import simd
from .functions import exp
from .simd import rint

LANES = simd.LANES
_PAGES = ATTENTION_BLOCK // PAGE


def padded_head_dim(head_dim: int) -> int:
    """head_dim rounded up to whole vectors: the row length of the value pool."""
    return -(-head_dim // LANES) * LANES


def workspace(threads: int, max_seq_len: int, head_dim: int) -> np.ndarray:
    """float32 [threads, n]: scores of one block and the results of every block of one query head."""
    blocks = -(-max_seq_len // ATTENTION_BLOCK)
    return np.empty((threads, ATTENTION_BLOCK + blocks * (padded_head_dim(head_dim) + 2)), np.float32)


@njit(cache=True)
def store(keys, values, key_pool, value_pool, pages, sequences, positions, rows):
    """Writes [rows, kv_heads * head_dim] keys and values, already of the pools' dtype, to their pages.

    pages is int32 [sequences, pages of a sequence]; sequences and positions are int32 [rows].
    """
    heads, head_dim = key_pool.shape[1], key_pool.shape[2]
    for r in range(rows):
        page, slot = pages[sequences[r], positions[r] // PAGE], positions[r] % PAGE
        for h in range(heads):
            for d in range(head_dim):
                key_pool[page, h, d, slot] = keys[r, h * head_dim + d]
                value_pool[page, h, slot, d] = values[r, h * head_dim + d]
    return OK


def attention(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window: int, scale, out, work, rows: int) -> int:
    """out[r, h] = softmax(q[r, h] · keys * scale) values over the positions visible to row r.

    q and out are float32 [M, heads * head_dim]; kv_of_head int32 [heads] gives each query head's row in the pools;
    visible are the last ``window`` positions up to positions[r] (all of them for window 0). ``work`` comes from
    ``workspace``; its first axis is the number of threads. Returns ``OK`` or ``OUT_OF_RANGE``.
    """
    run = _parallel if work.shape[0] > 1 else _serial
    faults = run(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, np.float32(scale), out, work, rows)
    return OUT_OF_RANGE if faults else OK


@njit(cache=True)
def _block(q, q_index, key_pool, value_pool, table, kv_head, first, last, scale, scores, result):
    """Positions first … last - 1 of one block: result = chains of weighted values, then the maximum, then the sum."""
    heads, head_dim, width = key_pool.shape[1], key_pool.shape[2], value_pool.shape[3]
    start = first // ATTENTION_BLOCK * ATTENTION_BLOCK
    multiplier = simd.splat(scale)
    for page in range(first // PAGE, (last - 1) // PAGE + 1):
        base = (table[page] * heads + kv_head) * head_dim * PAGE
        chain = simd.splat(np.float32(0))
        for d in range(head_dim):
            chain = simd.fma(simd.splat(q[q_index + d]), simd.load(key_pool, base + d * PAGE), chain)
        simd.store(scores, page * PAGE - start, simd.multiply(chain, multiplier))
    low, high = first - start, last - start
    largest = scores[low]
    for i in range(low, high):
        largest = max(largest, scores[i])
    total = np.int64(0)
    for i in range(low, high):
        weight = exp(scores[i] - largest)
        scores[i] = weight
        total += np.int64(rint(weight * FIXED))
    for lane in range(0, width, LANES):
        chain = simd.splat(np.float32(0))
        for i in range(low, high):
            position = start + i
            index = ((table[position // PAGE] * heads + kv_head) * PAGE + position % PAGE) * width + lane
            chain = simd.fma(simd.splat(scores[i]), simd.load(value_pool, index), chain)
        simd.store(result, lane, chain)
    result[width] = largest
    result[width + 1] = np.float32(np.float64(total) * UNFIXED)


@njit(cache=True, error_model="numpy")
def _merge(results, blocks, width, out, out_index, head_dim):
    """Adds the blocks as fixed point relative to their common maximum and divides; returns the number of faults."""
    largest, faults = results[width], 0
    for b in range(blocks):
        largest = max(largest, results[b * (width + 2) + width])
    total = np.int64(0)
    for b in range(blocks):
        base = b * (width + 2)
        weight = exp(results[base + width] - largest)
        results[base + width] = weight
        total += np.int64(rint((results[base + width + 1] * weight) * FIXED))
    divisor = np.float32(np.float64(total) * UNFIXED)
    for d in range(head_dim):
        total = np.int64(0)
        for b in range(blocks):
            value = results[b * (width + 2) + d] * results[b * (width + 2) + width]
            if abs(value) < BLOCK_LIMIT:
                total += np.int64(rint(value * FIXED))
            else:
                faults += 1
        out[out_index + d] = np.float32(np.float64(total) * UNFIXED) / divisor
    return faults


@njit(cache=True)
def _pairs(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, scale, out, work, first, last):
    """Pairs (row, head) first … last - 1, counted row by row."""
    heads, head_dim, width = kv_of_head.shape[0], key_pool.shape[2], value_pool.shape[3]
    scores, results = work[:ATTENTION_BLOCK], work[ATTENTION_BLOCK:]
    q, out = q.reshape(-1), out.reshape(-1)
    faults = 0
    for pair in range(first, last):
        row, head = pair // heads, pair % heads
        end = positions[row] + 1
        begin = max(0, end - window) if window > 0 else 0
        blocks, start = 0, begin
        while start < end:
            stop = min(end, (start // ATTENTION_BLOCK + 1) * ATTENTION_BLOCK)
            _block(q, pair * head_dim, key_pool, value_pool, pages[sequences[row]], kv_of_head[head], start, stop, scale,
                   scores, results[blocks * (width + 2) :])
            blocks, start = blocks + 1, stop
        faults += _merge(results, blocks, width, out, pair * head_dim, head_dim)
    return faults


@njit(cache=True)
def _serial(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, scale, out, work, rows):
    return _pairs(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, scale, out, work[0], 0,
                  rows * kv_of_head.shape[0])


@njit(cache=True, parallel=True)
def _parallel(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, scale, out, work, rows):
    pairs, threads, faults = rows * kv_of_head.shape[0], work.shape[0], 0
    for part in prange(threads):
        faults += _pairs(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window, scale, out, work[part],
                         pairs * part // threads, pairs * (part + 1) // threads)
    return faults
