"""Quantising weights on the CPU: same names and bits as the plain form in ``reference_quantize``, and ``threads``.

All but the scaling of a weight is integer arithmetic, so neither the vector width nor the number of threads can change
a bit. Rows, and chunks of a sample, are independent: a serial and a parallel loop call the same function for each.
"""

import numpy as np
from numba import config, get_num_threads, njit, prange, set_num_threads

from ..formats import CODE_BITS, CODE_BYTES, CODEBOOK_SIZE, PAIRS, Blocks, Packed
from ..numerics import GROUP
from ..reference_quantize import (
    ERROR_SHIFT,
    INVERSES,
    LARGEST,
    LIMIT,
    SQUARES,
    UNIT_BITS,
    check_range,
    inverse_scales,
    row_scales,
)

HALF = 1 << UNIT_BITS - 1
SIDE = 2 * LARGEST + 1          # points -127 … 127 in both directions
CHUNK = 256                     # groups of a sample that are summed together


def row_maxima(w, threads: int = 1) -> np.ndarray:
    """Bits (uint32 [n]) of each row's largest magnitude in float32 [n, k]; column shards combine by maximum."""
    w = np.ascontiguousarray(w, np.float32)
    maxima = np.zeros(w.shape[0], np.uint32)
    _run(_maxima_serial, _maxima_parallel, threads, w.view(np.uint32), maxima)
    return maxima


def quantize_q3_5(w, blocks: Blocks, codebook, maxima, threads: int = 1) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    ``codebook``: int8 [128, 2] with (0, 0) as entry 0, of the whole tensor. ``maxima``: ``row_maxima`` of whole rows.
    Raises ValueError for weights that are not finite or too large for float16 scales.
    """
    w = _rows(w, blocks)
    scales = row_scales(maxima)
    if scales.shape != (len(w),):
        raise ValueError(f"{len(w)} rows of weights need as many row maxima, not {scales.shape}")
    factors = np.zeros((len(w), blocks.groups), np.uint8)
    codes = np.zeros((len(w), blocks.groups, CODE_BYTES), np.uint8)
    _run(_pairs_serial, _pairs_parallel, threads, w, inverse_scales(scales), blocks.block, blocks.groups_per_block,
         _entries(codebook), _nearest(codebook), INVERSES, SQUARES, factors, codes)
    return Packed("q3_5", len(w), blocks, codes, factors, scales, codebook)


def quantize_q8(w, blocks: Blocks, threads: int = 1) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    A group's factor is float16(maximum / 127), its values rint(w / factor) within ±127, zeros where the factor is 0.
    Raises ValueError for weights that are not finite or too large for float16 factors.
    """
    w = _rows(w, blocks)
    maxima = np.zeros((len(w), blocks.groups), np.uint32)
    _run(_group_maxima_serial, _group_maxima_parallel, threads, w.view(np.uint32), blocks.block,
         blocks.groups_per_block, maxima)
    check_range(maxima.max(axis=1, initial=0))
    scales = (maxima.view(np.float32) / np.float32(LARGEST)).astype(np.float16)
    codes = np.zeros((len(w), blocks.groups, GROUP), np.int8)
    _run(_integers_serial, _integers_parallel, threads, w, blocks.block, blocks.groups_per_block,
         scales.astype(np.float32), codes)
    return Packed("q8", len(w), blocks, codes, scales.view(np.uint16))


def cell_sums(v, weights, codebook, threads: int = 1) -> np.ndarray:
    """int64 [128, 4] sums over the pairs that choose each codebook entry; see ``reference_quantize.cell_sums``."""
    parts = np.zeros((-(-len(v) // CHUNK), CODEBOOK_SIZE, 4), np.int64)
    _run(_sums_serial, _sums_parallel, threads, v, weights, _entries(codebook), _nearest(codebook), INVERSES, SQUARES,
         parts)
    return parts.sum(axis=0)


def _rows(w, blocks: Blocks) -> np.ndarray:
    w = np.ascontiguousarray(w, np.float32)
    if w.ndim != 2 or w.shape[1] != blocks.size:
        raise ValueError(f"weights of shape {w.shape} must be [n, {blocks.size}]")
    return w


def _run(serial, parallel, threads: int, *arrays) -> None:
    if threads == 1:
        return serial(*arrays)
    before = get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    try:
        parallel(*arrays)
    finally:
        set_num_threads(before)


def _entries(codebook) -> np.ndarray:
    return codebook.astype(np.int32) << UNIT_BITS


def _nearest(codebook) -> np.ndarray:
    table = np.empty(SIDE * SIDE, np.uint8)
    _fill_nearest(codebook.astype(np.int32), table)
    return table


@njit(cache=True)
def _fill_nearest(codebook, table):
    """Entry nearest to each point of the plane: distance and index share an integer, so ties go to the lowest index."""
    column = np.empty(SIDE, np.int32)
    for a in range(SIDE):
        column[:] = np.int32(0x7FFFFFFF)
        for entry in range(CODEBOOK_SIZE):
            across = np.int32(a - LARGEST - codebook[entry, 0])
            for b in range(SIDE):
                along = np.int32(b - LARGEST - codebook[entry, 1])
                column[b] = min(column[b], np.int32((across * across + along * along) << CODE_BITS | entry))
        for b in range(SIDE):
            table[a * SIDE + b] = column[b] & (CODEBOOK_SIZE - 1)


@njit(cache=True)
def _choose(v, nearest, entries, inverses, squares, x, cells, y):
    """The factor of least error for the group ``v``, float32 [2, 16]: first and second weights of the pairs.

    Scratch: int32 ``x``, ``y`` [2, 16 * factors] and ``cells``. Leaves in ``x`` the fixed-point weights under every
    factor, and in ``cells`` the points of the table ``nearest`` that they fall on. Three passes, so that the first and
    the last become vector code around the lookups.
    """
    for factor in range(len(inverses)):
        for pair in range(PAIRS):
            at = factor * PAIRS + pair
            for i in range(2):
                unit = min(max(np.rint(v[i, pair] * inverses[factor]), np.float32(-LIMIT)), np.float32(LIMIT))
                x[i, at] = np.int32(unit)
            cells[at] = np.int32(_point(x[0, at]) * np.int32(SIDE)) + _point(x[1, at])
    for at in range(len(cells)):
        code = nearest[cells[at]]
        y[0, at], y[1, at] = entries[code, 0], entries[code, 1]
    least, best = np.inf, 0
    for factor in range(len(inverses)):
        error = np.int32(0)
        for at in range(factor * PAIRS, (factor + 1) * PAIRS):
            a, b = np.int32(x[0, at] - y[0, at]), np.int32(x[1, at] - y[1, at])
            error = np.int32(error + np.int32(np.int32(a * a) + np.int32(b * b)))
        if error * squares[factor] < least:
            least, best = error * squares[factor], factor
    return best


@njit(cache=True)
def _point(x):
    """A fixed-point coordinate rounded to whole units, as an index of the table's side; in int32 for full vectors."""
    whole = np.int32(np.int32(x + np.int32(HALF)) >> np.int32(UNIT_BITS))
    return np.int32(min(max(whole, np.int32(-LARGEST)), np.int32(LARGEST)) + np.int32(LARGEST))


@njit(cache=True)
def _scratch():
    points = len(SQUARES) * PAIRS
    return np.empty((2, points), np.int32), np.empty(points, np.int32), np.empty((2, points), np.int32)


@njit(cache=True)
def _pack(codes, out):
    """16 fields of 7 bits, lowest first."""
    for half in range(2):
        bits = np.uint64(0)
        for i in range(8):
            bits |= np.uint64(codes[8 * half + i]) << np.uint64(CODE_BITS * i)
        for i in range(CODE_BITS):
            out[CODE_BITS * half + i] = (bits >> np.uint64(8 * i)) & np.uint64(255)


@njit(cache=True)
def _pairs_row(w, inverse_scale, block, groups_per_block, entries, nearest, inverses, squares, factors, codes):
    v, chosen = np.zeros((2, PAIRS), np.float32), np.empty(PAIRS, np.uint8)
    x, cells, y = _scratch()
    for group in range(len(factors)):
        first, end = _group(group, block, groups_per_block, len(w))
        v[:] = 0
        for i in range(end - first):
            v[i & 1, i >> 1] = w[first + i] * inverse_scale
        factor = _choose(v, nearest, entries, inverses, squares, x, cells, y)
        factors[group] = factor
        for pair in range(PAIRS):
            chosen[pair] = nearest[cells[factor * PAIRS + pair]]
        _pack(chosen, codes[group])


@njit(cache=True)
def _group(group, block, groups_per_block, size):
    """First k of a group and the end of its k."""
    start = group // groups_per_block * block
    first = start + group % groups_per_block * GROUP
    return first, min(first + GROUP, start + block, size)


@njit(cache=True)
def _pairs_serial(w, inverse, block, groups_per_block, entries, nearest, inverses, squares, factors, codes):
    for n in range(len(w)):
        _pairs_row(w[n], inverse[n], block, groups_per_block, entries, nearest, inverses, squares, factors[n], codes[n])


@njit(cache=True, parallel=True)
def _pairs_parallel(w, inverse, block, groups_per_block, entries, nearest, inverses, squares, factors, codes):
    for n in prange(len(w)):
        _pairs_row(w[n], inverse[n], block, groups_per_block, entries, nearest, inverses, squares, factors[n], codes[n])


@njit(cache=True)
def _sums_chunk(v, weights, entries, nearest, inverses, squares, sums):
    pairs = np.empty((2, PAIRS), np.float32)
    x, cells, y = _scratch()
    for group in range(len(v)):
        for i in range(GROUP):
            pairs[i & 1, i >> 1] = v[group, i]
        factor = _choose(pairs, nearest, entries, inverses, squares, x, cells, y)
        weight = np.int64(np.rint(weights[group] * squares[factor]))
        for at in range(factor * PAIRS, (factor + 1) * PAIRS):
            code, a, b = nearest[cells[at]], np.int64(x[0, at]), np.int64(x[1, at])
            sums[code, 0] += weight
            sums[code, 1] += weight * a
            sums[code, 2] += weight * b
            a -= entries[code, 0]
            b -= entries[code, 1]
            sums[code, 3] += weight * (a * a + b * b) >> ERROR_SHIFT


@njit(cache=True)
def _sums_serial(v, weights, entries, nearest, inverses, squares, parts):
    for part in range(len(parts)):
        chunk = slice(part * CHUNK, (part + 1) * CHUNK)
        _sums_chunk(v[chunk], weights[chunk], entries, nearest, inverses, squares, parts[part])


@njit(cache=True, parallel=True)
def _sums_parallel(v, weights, entries, nearest, inverses, squares, parts):
    for part in prange(len(parts)):
        chunk = slice(part * CHUNK, (part + 1) * CHUNK)
        _sums_chunk(v[chunk], weights[chunk], entries, nearest, inverses, squares, parts[part])


@njit(cache=True)
def _maximum(bits):
    largest = np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return largest


@njit(cache=True)
def _maxima_serial(bits, maxima):
    for n in range(len(bits)):
        maxima[n] = _maximum(bits[n])


@njit(cache=True, parallel=True)
def _maxima_parallel(bits, maxima):
    for n in prange(len(bits)):
        maxima[n] = _maximum(bits[n])


@njit(cache=True)
def _group_maxima_row(bits, block, groups_per_block, maxima):
    for group in range(len(maxima)):
        first, end = _group(group, block, groups_per_block, len(bits))
        maxima[group] = _maximum(bits[first:end])


@njit(cache=True)
def _group_maxima_serial(bits, block, groups_per_block, maxima):
    for n in range(len(bits)):
        _group_maxima_row(bits[n], block, groups_per_block, maxima[n])


@njit(cache=True, parallel=True)
def _group_maxima_parallel(bits, block, groups_per_block, maxima):
    for n in prange(len(bits)):
        _group_maxima_row(bits[n], block, groups_per_block, maxima[n])


@njit(cache=True)
def _integers_row(w, block, groups_per_block, factors, codes):
    for group in range(len(factors)):
        first, end = _group(group, block, groups_per_block, len(w))
        factor = factors[group]
        if factor > 0:
            for i in range(end - first):
                value = np.rint(w[first + i] / factor)
                codes[group, i] = np.int32(min(max(value, np.float32(-LARGEST)), np.float32(LARGEST)))


@njit(cache=True)
def _integers_serial(w, block, groups_per_block, factors, codes):
    for n in range(len(w)):
        _integers_row(w[n], block, groups_per_block, factors[n], codes[n])


@njit(cache=True, parallel=True)
def _integers_parallel(w, block, groups_per_block, factors, codes):
    for n in prange(len(w)):
        _integers_row(w[n], block, groups_per_block, factors[n], codes[n])
