"""Panels: the products of up to 32 rows of quantised weights (two tiles of 16) with some tokens, as int64 totals.

Activations lie by units of eight groups (256 k): x int8 [units, capacity, 256], x_scales float32 and corrections int32 [units,
capacity, 8]; tokens of a unit are neighbours in the caches. Totals are int64 [tokens, 32], the sum over reduction blocks of
rint(block value * 2**32).

Weights are decoded in registers, in the order in which they stream from memory, anew for each register tile of 16 rows and up to
eight tokens: one lookup serves eight dot products then, and nothing is written back.
"""

import numpy as np
from numba import njit

from ..numerics import GROUP
from . import simd, target
from . import simd_int8 as int8

LANES = simd.LANES
WIDTH = 2 * LANES               # rows of a panel
UNIT = int8.UNIT                # groups of a unit
UNIT_BYTES = UNIT * GROUP
# Register tiles: tokens whose counts, nearly with their chains, fit into 32 registers of 16 rows, or 16 of 8 or of 4.
WIDE, MIDDLE = {512: (8, 4), 256: (4, 2)}.get(target.vector_bits(), (2, 2))
AHEAD_ONE, AHEAD_MANY = 7680, 12288             # bytes to prefetch ahead of the weights in use
AHEAD_BETWEEN = 1024                            # and how many more between two panels


@njit(cache=True)
def _register_tile(kind, zeros, data, at, table, groups, per_block, x, x_scales, corrections, capacity, base, token, scales,
                   totals, column, ahead, end, jump, largest):
    """One tile of 16 rows, whose weights start at data[at], for the tokens of a register tile; added to ``totals``.

    Token t is row base + t of the activations. Prefetches ``ahead`` bytes ahead, from data[end] on ``jump`` bytes further.
    """
    chain, left, per_unit = simd.tile_clear(zeros), per_block, units_of(per_block)
    line, out = int8.load_bytes(data, at), token * WIDTH + column
    row, place = base + token, 0
    for pair in range((groups + 1) // 2):
        if pair % int8.line_pairs_of(kind) == 0:
            line = int8.load_bytes(data, at)
            int8.prefetch_to_read(data, at + (ahead + jump if at + ahead >= end else ahead))
            at += int8.BYTES
        later = at + ahead
        raw = int8.load_raw(kind, data, at, ahead + jump if later >= end else ahead)
        at += int8.vectors_of(kind) * int8.BYTES
        counts = int8.counts_start(kind, zeros, corrections, row * UNIT + place, UNIT)
        counts = int8.dots(kind, counts, raw, 0, table, x, row * UNIT_BYTES + place * GROUP, UNIT_BYTES)
        chain = int8.tile_fma_counts(chain, counts, int8.factors_of(kind, line, 0), x_scales, row * UNIT + place, UNIT)
        left, place = left - 1, place + 1
        if left == 0:
            largest = int8.tile_add_totals(chain, scales, totals, out, WIDTH, largest)
            chain, left = simd.tile_clear(zeros), per_block
        if place == per_unit:
            row, place = row + capacity, 0
        # The last group may only complete a pair: it has no activations of its own.
        if 2 * pair + 1 == groups:
            break
        counts = int8.counts_start(kind, zeros, corrections, row * UNIT + place, UNIT)
        counts = int8.dots(kind, counts, raw, 1, table, x, row * UNIT_BYTES + place * GROUP, UNIT_BYTES)
        chain = int8.tile_fma_counts(chain, counts, int8.factors_of(kind, line, 1), x_scales, row * UNIT + place, UNIT)
        line = int8.next_line(kind, line)
        left, place = left - 1, place + 1
        if left == 0:
            largest = int8.tile_add_totals(chain, scales, totals, out, WIDTH, largest)
            chain, left = simd.tile_clear(zeros), per_block
        if place == per_unit:
            row, place = row + capacity, 0
    if left < per_block:
        largest = int8.tile_add_totals(chain, scales, totals, out, WIDTH, largest)
    return largest


@njit(cache=True)
def units_of(per_block):
    """Groups of a unit: whole blocks, at most eight groups."""
    return UNIT // per_block * per_block


@njit(cache=True)
def integer_tile(kind, data, at, table, groups, per_block, x, x_scales, corrections, capacity, base, rows, scales, totals, column,
                 end, jump, largest):
    """One tile of 16 rows, whose weights start at data[at], for rows base … of the activations; added to totals[:, column:].

    The weights that are read next follow until data[end], and go on ``jump`` bytes behind it.
    """
    # Not a bare 0: Numba would compile a register tile for a literal first, and then again.
    token, ahead = np.int64(0), AHEAD_ONE if rows < WIDE else AHEAD_MANY
    while token + WIDE <= rows:
        largest = _register_tile(kind, simd.tile_zeros(WIDE), data, at, table, groups, per_block, x, x_scales, corrections,
                                 capacity, base, token, scales, totals, column, ahead, end, jump, largest)
        token += WIDE
    while token + MIDDLE <= rows:
        largest = _register_tile(kind, simd.tile_zeros(MIDDLE), data, at, table, groups, per_block, x, x_scales, corrections,
                                 capacity, base, token, scales, totals, column, ahead, end, jump, largest)
        token += MIDDLE
    while token + 2 <= rows:
        largest = _register_tile(kind, simd.tile_zeros(2), data, at, table, groups, per_block, x, x_scales, corrections, capacity,
                                 base, token, scales, totals, column, ahead, end, jump, largest)
        token += 2
    if token < rows:
        largest = _register_tile(kind, simd.tile_zeros(1), data, at, table, groups, per_block, x, x_scales, corrections, capacity,
                                 base, token, scales, totals, column, ahead, end, jump, largest)
    return largest
