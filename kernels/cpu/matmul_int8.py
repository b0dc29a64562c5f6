"""Products of int8 activations on AVX-512 with VNNI: from bytes, or straight from the 7-bit codes of ``q3_5`` (VBMI).

Same sums, bit for bit, as the float form in ``matmul``. Activations lie by reduction block: x int8 [blocks, capacity, 32 *
groups of a block], x_scales float32 and corrections int32 [blocks, capacity, groups of a block], so that the rows of a block are
neighbours in the caches. Within every eight k activations and bytes lie in ``PAIR_ORDER``, so that the first, then the second
weights of four pairs each meet four neighbouring bytes of x. Weights are offset by 128.
"""

import numpy as np
from numba import njit, prange

from ..formats import FACTORS
from ..numerics import BLOCK_LIMIT, FIXED, GROUP
from . import simd
from . import simd_int8 as int8

LANES = simd.LANES
PAIR_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STEPS = GROUP // 4              # dot products of four k in a group
BYTES = 64                      # of one step of a tile: 16 rows x 4 k
CODES = 56                      # bytes of 64 codes of 7 bits: 16 rows x 4 pairs
GROUP_CODES = 4 * CODES         # of a group of 16 rows
WIDTH = 2 * LANES              # outputs of a token in the scratch of two tiles
LIMIT_BITS = (BLOCK_LIMIT * FIXED).view(np.int32)
FEW = 12                        # tokens up to which weights are decoded anew for every register tile


@njit(cache=True)
def _pairs_tile(zeros, x, x_scales, corrections, codes, factors, table, row_scales, totals, tile, token, largest):
    """One tile of 16 rows from 7-bit codes, for the tokens of a register tile, added to ``totals``."""
    groups, capacity, per_block = factors.shape[1], x.shape[1], x_scales.shape[2]
    width = x.shape[2]
    first_low, first_high = int8.load_bytes(table, 0), int8.load_bytes(table, BYTES)
    second_low, second_high = int8.load_bytes(table, 2 * BYTES), int8.load_bytes(table, 3 * BYTES)
    choices, scales = simd.load(FACTORS, 0), simd.multiply(simd.load(row_scales, tile * LANES), simd.splat(FIXED))
    for block in range(x.shape[0]):
        chain, row = simd.tile_clear(zeros), block * capacity + token
        for group in range(min(per_block, groups - block * per_block)):
            at, place = tile * groups + block * per_block + group, row * per_block + group
            counts = int8.counts_start(zeros, corrections, place, per_block)
            for eight in range(4):
                pairs = int8.codes_of(int8.load_bytes(codes, at * GROUP_CODES + eight * CODES))
                k = row * width + group * GROUP + eight * 8
                counts = int8.dot(counts, int8.look_up(pairs, first_low, first_high), x, k, width)
                counts = int8.dot(counts, int8.look_up(pairs, second_low, second_high), x, k + 4, width)
            factor = int8.choose_factors(factors, at * 8, choices)
            chain = int8.tile_fma_counts(chain, counts, 0, factor, x_scales, place, per_block)
        largest = int8.tile_add_totals(chain, scales, totals, token * WIDTH, WIDTH, largest)
    return largest


@njit(cache=True)
def _bytes_tile(zeros, x, x_scales, corrections, values, factors, row_scales, totals, tile, token, largest):
    """As ``_pairs_tile``, from bytes and float factors."""
    groups, capacity, per_block = factors.shape[1], x.shape[1], x_scales.shape[2]
    width = x.shape[2]
    scales = simd.multiply(simd.load(row_scales, tile * LANES), simd.splat(FIXED))
    for block in range(x.shape[0]):
        chain, row = simd.tile_clear(zeros), block * capacity + token
        for group in range(min(per_block, groups - block * per_block)):
            at, place = tile * groups + block * per_block + group, row * per_block + group
            counts = int8.counts_start(zeros, corrections, place, per_block)
            for step in range(STEPS):
                weights = int8.load_bytes(values, (at * STEPS + step) * BYTES)
                counts = int8.dot(counts, weights, x, row * width + group * GROUP + step * 4, width)
            chain = int8.tile_fma_counts(chain, counts, 0, simd.load(factors, at * LANES), x_scales, place, per_block)
        largest = int8.tile_add_totals(chain, scales, totals, token * WIDTH, WIDTH, largest)
    return largest


@njit(cache=True)
def _block_tiles(zeros, x, x_scales, corrections, values, values_stride, factors, factors_stride, scales0, scales1, block, count,
                 totals, token, largest):
    """One reduction block of ``count`` groups, of two tiles of 16 rows, for the tokens of a register tile.

    Bytes and factors of the block's groups start at index 0; those of the second tile lie a stride further.
    """
    width, per_block, row = x.shape[2], x_scales.shape[2], block * x.shape[1] + token
    chain0, chain1 = simd.tile_clear(zeros), simd.tile_clear(zeros)
    for group in range(count):
        place = row * per_block + group
        counts = int8.counts_twice(int8.counts_start(zeros, corrections, place, per_block))
        for step in range(STEPS):
            at, k = (group * STEPS + step) * BYTES, row * width + group * GROUP + step * 4
            counts = int8.dot_two(counts, int8.load_bytes(values, at), int8.load_bytes(values, values_stride + at), x, k, width)
        factor = simd.load(factors, group * LANES)
        chain0 = int8.tile_fma_counts(chain0, counts, 0, factor, x_scales, place, per_block)
        factor = simd.load(factors, factors_stride + group * LANES)
        chain1 = int8.tile_fma_counts(chain1, counts, 1, factor, x_scales, place, per_block)
    largest = int8.tile_add_totals(chain0, scales0, totals, token * WIDTH, WIDTH, largest)
    return int8.tile_add_totals(chain1, scales1, totals, token * WIDTH + LANES, WIDTH, largest)


@njit(cache=True)
def _block_tokens(x, x_scales, corrections, values, values_stride, factors, factors_stride, row_scales, block, count, totals,
                  tile, rows, largest):
    """One reduction block of two tiles for all tokens."""
    scales0 = simd.multiply(simd.load(row_scales, tile * LANES), simd.splat(FIXED))
    scales1 = simd.multiply(simd.load(row_scales, (tile + 1) * LANES), simd.splat(FIXED))
    token = 0
    while token + 6 <= rows:
        largest = _block_tiles(simd.tile_zeros(6), x, x_scales, corrections, values, values_stride, factors, factors_stride,
                               scales0, scales1, block, count, totals, token, largest)
        token += 6
    while token < rows:
        largest = _block_tiles(simd.tile_zeros(1), x, x_scales, corrections, values, values_stride, factors, factors_stride,
                               scales0, scales1, block, count, totals, token, largest)
        token += 1
    return largest


@njit(cache=True)
def _decode_block(codes, table, indices, tile, groups, first, last, values, factors):
    """Bytes and float factors of the groups first … last - 1 of two tiles: values [2, steps, 64], factors [2, groups, 16]."""
    first_low, first_high = int8.load_bytes(table, 0), int8.load_bytes(table, BYTES)
    second_low, second_high = int8.load_bytes(table, 2 * BYTES), int8.load_bytes(table, 3 * BYTES)
    choices, count = simd.load(FACTORS, 0), last - first
    for part in range(2):
        for group in range(count):
            at = (tile + part) * groups + first + group
            simd.store(factors, (part * count + group) * LANES, int8.choose_factors(indices, at * 8, choices))
            for eight in range(4):
                pairs = int8.codes_of(int8.load_bytes(codes, at * GROUP_CODES + eight * CODES))
                step = ((part * count + group) * STEPS + 2 * eight) * BYTES
                int8.store_bytes(values, step, int8.look_up(pairs, first_low, first_high))
                int8.store_bytes(values, step + BYTES, int8.look_up(pairs, second_low, second_high))


@njit(cache=True)
def _pairs(x, x_scales, corrections, codes, indices, table, row_scales, sums, rows, first, last, values, factors, totals):
    """Tiles first … last - 1; whether a value was out of range.

    Scratch: ``values`` and ``factors`` for one decoded block of two tiles, ``totals`` [rows, 32].
    """
    groups, per_block, tile = indices.shape[1], x_scales.shape[2], first
    largest = int8.no_bits()
    while rows > FEW and tile + 2 <= last:
        totals[: rows * WIDTH] = 0
        for block in range(x.shape[0]):
            start, count = block * per_block, min(per_block, groups - block * per_block)
            _decode_block(codes, table, indices, tile, groups, start, start + count, values, factors)
            largest = _block_tokens(x, x_scales, corrections, values, count * STEPS * BYTES, factors, count * LANES, row_scales,
                                    block, count, totals, tile, rows, largest)
        _store(totals, sums, rows, tile, 2)
        tile += 2
    while tile < last:
        totals[: rows * WIDTH] = 0
        token = 0
        while token + 4 <= rows:
            largest = _pairs_tile(simd.tile_zeros(4), x, x_scales, corrections, codes, indices, table, row_scales, totals, tile,
                                  token, largest)
            token += 4
        while token < rows:
            largest = _pairs_tile(simd.tile_zeros(1), x, x_scales, corrections, codes, indices, table, row_scales, totals, tile,
                                  token, largest)
            token += 1
        _store(totals, sums, rows, tile, 1)
        tile += 1
    return not int8.all_below(largest, LIMIT_BITS)


@njit(cache=True)
def _bytes(x, x_scales, corrections, values, factors, row_scales, sums, rows, first, last, totals):
    """Tiles first … last - 1 from bytes; whether a value was out of range. Scratch: ``totals`` [rows, 32]."""
    groups, per_block, tile = factors.shape[1], x_scales.shape[2], first
    flat_values, flat_factors = values.reshape(-1), factors.reshape(-1)
    largest = int8.no_bits()
    while rows > FEW and tile + 2 <= last:
        totals[: rows * WIDTH] = 0
        for block in range(x.shape[0]):
            at, count = tile * groups + block * per_block, min(per_block, groups - block * per_block)
            largest = _block_tokens(x, x_scales, corrections, flat_values[at * STEPS * BYTES :], groups * STEPS * BYTES,
                                    flat_factors[at * LANES :], groups * LANES, row_scales, block, count, totals, tile, rows,
                                    largest)
        _store(totals, sums, rows, tile, 2)
        tile += 2
    while tile < last:
        totals[: rows * WIDTH] = 0
        token = 0
        while token + 4 <= rows:
            largest = _bytes_tile(simd.tile_zeros(4), x, x_scales, corrections, values, factors, row_scales, totals, tile, token,
                                  largest)
            token += 4
        while token < rows:
            largest = _bytes_tile(simd.tile_zeros(1), x, x_scales, corrections, values, factors, row_scales, totals, tile, token,
                                  largest)
            token += 1
        _store(totals, sums, rows, tile, 1)
        tile += 1
    return not int8.all_below(largest, LIMIT_BITS)


@njit(cache=True)
def _store(totals, sums, rows, tile, count):
    """Moves the totals of ``count`` tiles to their columns of ``sums``.

    Rows of ``sums`` often lie a multiple of 4096 bytes apart, where they would compete for the same cache sets: blocks are
    therefore added up in ``totals``.
    """
    for token in range(rows):
        for i in range(count * LANES):
            sums[token, tile * LANES + i] = totals[token * WIDTH + i]


@njit(cache=True)
def pairs_serial(x, x_scales, corrections, codes, indices, table, row_scales, sums, rows, values, factors, totals):
    return _pairs(x, x_scales, corrections, codes, indices, table, row_scales, sums, rows, 0, codes.shape[0],
                  values[0], factors[0], totals[0])


@njit(cache=True, parallel=True)
def pairs_parallel(x, x_scales, corrections, codes, indices, table, row_scales, sums, rows, values, factors, totals):
    count, threads, faults = codes.shape[0], values.shape[0], 0
    for part in prange(threads):
        faults += _pairs(x, x_scales, corrections, codes, indices, table, row_scales, sums, rows,
                         count * part // threads, count * (part + 1) // threads, values[part], factors[part], totals[part])
    return faults


@njit(cache=True)
def bytes_serial(x, x_scales, corrections, values, factors, row_scales, sums, rows, totals):
    return _bytes(x, x_scales, corrections, values, factors, row_scales, sums, rows, 0, values.shape[0], totals[0])


@njit(cache=True, parallel=True)
def bytes_parallel(x, x_scales, corrections, values, factors, row_scales, sums, rows, totals):
    count, threads, faults = values.shape[0], totals.shape[0], 0
    for part in prange(threads):
        faults += _bytes(x, x_scales, corrections, values, factors, row_scales, sums, rows, count * part // threads,
                         count * (part + 1) // threads, totals[part])
    return faults
