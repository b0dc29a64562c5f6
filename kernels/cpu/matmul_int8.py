"""Products of int8 activations on AVX-512 with VNNI: from bytes, or straight from the 7-bit codes of ``q3_5`` (VBMI).

Same sums, bit for bit, as the float form in ``matmul``. Within every eight k activations and bytes lie in ``PAIR_ORDER``, so
that the first, then the second weights of four pairs each meet four neighbouring bytes of x. Weights are offset by 128.
"""

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
FEW = 12                        # tokens up to which weights are decoded anew for every register tile


@njit(cache=True)
def _pairs_tile(zeros, x, x_scales, corrections, codes, factors, table, row_scales, per_block, sums, tile, token):
    """One tile of 16 rows from 7-bit codes, for the tokens of a register tile; whether all block values were in range."""
    groups, width = factors.shape[1], sums.shape[1]
    columns = groups * GROUP
    first_low, first_high = int8.load_bytes(table, 0), int8.load_bytes(table, BYTES)
    second_low, second_high = int8.load_bytes(table, 2 * BYTES), int8.load_bytes(table, 3 * BYTES)
    scales, choices = simd.load(row_scales, tile * LANES), simd.load(FACTORS, 0)
    within = True
    for start in range(0, groups, per_block):
        chain = simd.tile_clear(zeros)
        for group in range(start, min(start + per_block, groups)):
            at, place = tile * groups + group, token * groups + group
            counts = int8.counts_start(zeros, corrections, place, groups)
            for eight in range(4):
                pairs = int8.codes_of(int8.load_bytes(codes, at * GROUP_CODES + eight * CODES))
                k = token * columns + group * GROUP + eight * 8
                counts = int8.dot(counts, int8.look_up(pairs, first_low, first_high), x, k, columns)
                counts = int8.dot(counts, int8.look_up(pairs, second_low, second_high), x, k + 4, columns)
            chain = int8.tile_fma_counts(chain, counts, 0, int8.choose_factors(factors, at * 8, choices), x_scales, place, groups)
        within &= simd.tile_add_fixed(chain, scales, sums, token * width + tile * LANES, width, FIXED, BLOCK_LIMIT)
    return within


@njit(cache=True)
def _bytes_tile(zeros, x, x_scales, corrections, values, factors, row_scales, per_block, sums, tile, token):
    """As ``_pairs_tile``, from bytes and float factors."""
    groups, width = factors.shape[1], sums.shape[1]
    columns = groups * GROUP
    scales = simd.load(row_scales, tile * LANES)
    within = True
    for start in range(0, groups, per_block):
        chain = simd.tile_clear(zeros)
        for group in range(start, min(start + per_block, groups)):
            at, place = tile * groups + group, token * groups + group
            counts = int8.counts_start(zeros, corrections, place, groups)
            for step in range(STEPS):
                weights = int8.load_bytes(values, (at * STEPS + step) * BYTES)
                counts = int8.dot(counts, weights, x, token * columns + group * GROUP + step * 4, columns)
            chain = int8.tile_fma_counts(chain, counts, 0, simd.load(factors, at * LANES), x_scales, place, groups)
        within &= simd.tile_add_fixed(chain, scales, sums, token * width + tile * LANES, width, FIXED, BLOCK_LIMIT)
    return within


@njit(cache=True)
def _block_tiles(zeros, x, x_scales, corrections, values, values_stride, factors, factors_stride, row_scales, count, first,
                 groups, sums, tile, token):
    """One reduction block, ``count`` groups from ``first`` on, of two tiles of 16 rows, for the tokens of a register tile.

    Bytes and factors of the block's groups start at index 0; those of the second tile lie a stride further.
    """
    width, columns = sums.shape[1], groups * GROUP
    chain0, chain1 = simd.tile_clear(zeros), simd.tile_clear(zeros)
    for group in range(count):
        place = token * groups + first + group
        counts = int8.counts_twice(int8.counts_start(zeros, corrections, place, groups))
        for step in range(STEPS):
            at = (group * STEPS + step) * BYTES
            k = token * columns + (first + group) * GROUP + step * 4
            counts = int8.dot_two(counts, int8.load_bytes(values, at), int8.load_bytes(values, values_stride + at), x, k, columns)
        factor = simd.load(factors, group * LANES)
        chain0 = int8.tile_fma_counts(chain0, counts, 0, factor, x_scales, place, groups)
        factor = simd.load(factors, factors_stride + group * LANES)
        chain1 = int8.tile_fma_counts(chain1, counts, 1, factor, x_scales, place, groups)
    at = token * width + tile * LANES
    within = simd.tile_add_fixed(chain0, simd.load(row_scales, tile * LANES), sums, at, width, FIXED, BLOCK_LIMIT)
    scales = simd.load(row_scales, (tile + 1) * LANES)
    return within & simd.tile_add_fixed(chain1, scales, sums, at + LANES, width, FIXED, BLOCK_LIMIT)


@njit(cache=True)
def _block_tokens(x, x_scales, corrections, values, values_stride, factors, factors_stride, row_scales, count, first, groups,
                  sums, tile, rows):
    faults, token = 0, 0
    while token + 6 <= rows:
        faults += not _block_tiles(simd.tile_zeros(6), x, x_scales, corrections, values, values_stride, factors, factors_stride,
                                   row_scales, count, first, groups, sums, tile, token)
        token += 6
    while token < rows:
        faults += not _block_tiles(simd.tile_zeros(1), x, x_scales, corrections, values, values_stride, factors, factors_stride,
                                   row_scales, count, first, groups, sums, tile, token)
        token += 1
    return faults


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
def _pairs(x, x_scales, corrections, codes, indices, table, row_scales, per_block, sums, rows, first, last, values, factors):
    """Tiles first … last - 1; ``values`` and ``factors`` hold one decoded block of two tiles."""
    groups, faults, tile = indices.shape[1], 0, first
    for column in range(first * LANES, last * LANES, LANES):
        sums[:rows, column : column + LANES] = 0
    while rows > FEW and tile + 2 <= last:
        for start in range(0, groups, per_block):
            stop = min(start + per_block, groups)
            _decode_block(codes, table, indices, tile, groups, start, stop, values, factors)
            faults += _block_tokens(x, x_scales, corrections, values, (stop - start) * STEPS * BYTES, factors,
                                    (stop - start) * LANES, row_scales, stop - start, start, groups, sums, tile, rows)
        tile += 2
    while tile < last:
        token = 0
        while token + 4 <= rows:
            faults += not _pairs_tile(simd.tile_zeros(4), x, x_scales, corrections, codes, indices, table, row_scales, per_block,
                                      sums, tile, token)
            token += 4
        while token < rows:
            faults += not _pairs_tile(simd.tile_zeros(1), x, x_scales, corrections, codes, indices, table, row_scales, per_block,
                                      sums, tile, token)
            token += 1
        tile += 1
    return faults


@njit(cache=True)
def _bytes(x, x_scales, corrections, values, factors, row_scales, per_block, sums, rows, first, last):
    """Tiles first … last - 1 from bytes."""
    groups, faults, tile = factors.shape[1], 0, first
    flat_values, flat_factors = values.reshape(-1), factors.reshape(-1)
    for column in range(first * LANES, last * LANES, LANES):
        sums[:rows, column : column + LANES] = 0
    while rows > FEW and tile + 2 <= last:
        for start in range(0, groups, per_block):
            stop = min(start + per_block, groups)
            at = tile * groups + start
            faults += _block_tokens(x, x_scales, corrections, flat_values[at * STEPS * BYTES :], groups * STEPS * BYTES,
                                    flat_factors[at * LANES :], groups * LANES, row_scales, stop - start, start, groups, sums,
                                    tile, rows)
        tile += 2
    while tile < last:
        token = 0
        while token + 4 <= rows:
            faults += not _bytes_tile(simd.tile_zeros(4), x, x_scales, corrections, values, factors, row_scales, per_block, sums,
                                      tile, token)
            token += 4
        while token < rows:
            faults += not _bytes_tile(simd.tile_zeros(1), x, x_scales, corrections, values, factors, row_scales, per_block, sums,
                                      tile, token)
            token += 1
        tile += 1
    return faults


@njit(cache=True)
def pairs_serial(x, x_scales, corrections, codes, indices, table, row_scales, per_block, sums, rows, values, factors):
    return _pairs(x, x_scales, corrections, codes, indices, table, row_scales, per_block, sums, rows, 0, codes.shape[0],
                  values[0], factors[0])


@njit(cache=True, parallel=True)
def pairs_parallel(x, x_scales, corrections, codes, indices, table, row_scales, per_block, sums, rows, values, factors):
    count, threads, faults = codes.shape[0], values.shape[0], 0
    for part in prange(threads):
        faults += _pairs(x, x_scales, corrections, codes, indices, table, row_scales, per_block, sums, rows,
                         count * part // threads, count * (part + 1) // threads, values[part], factors[part])
    return faults


@njit(cache=True)
def bytes_serial(x, x_scales, corrections, values, factors, row_scales, per_block, sums, rows, threads):
    return _bytes(x, x_scales, corrections, values, factors, row_scales, per_block, sums, rows, 0, values.shape[0])


@njit(cache=True, parallel=True)
def bytes_parallel(x, x_scales, corrections, values, factors, row_scales, per_block, sums, rows, threads):
    count, faults = values.shape[0], 0
    for part in prange(threads):
        faults += _bytes(x, x_scales, corrections, values, factors, row_scales, per_block, sums, rows, count * part // threads,
                         count * (part + 1) // threads)
    return faults
