"""Panels: the products of up to 32 rows of quantised weights (two tiles of 16) with some tokens, as int64 totals.

Activations lie by units of eight groups (256 k): x int8 [units, capacity, 256], x_scales float32 and corrections int32 [units,
capacity, 8]; tokens of a unit are neighbours in the caches. Totals are int64 [tokens, 32], the sum over reduction blocks of
rint(block value * 2**32).

Weights are decoded in registers, in the order in which they stream from memory, anew for each register tile of 16 rows and up to
eight tokens: one lookup serves eight dot products then, and nothing is written back.
"""

import numpy as np
from numba import njit

from ..numerics import FIXED, GROUP
from . import simd, target
from . import simd_int8 as int8

LANES = simd.LANES
WIDTH = 2 * LANES               # rows of a panel
UNIT = int8.UNIT                # groups of a unit
UNIT_BYTES = UNIT * GROUP
# Register tiles: (tokens, tiles of 16 rows) whose counts and chains fit nearly into 32 registers of 16 rows, or 16 of 8 or of 4.
WIDE, TILES, MIDDLE = {512: (6, 2, 4), 256: (4, 1, 2)}.get(target.vector_bits(), (2, 1, 2))
AHEAD_ONE, AHEAD_MANY = 7680, 12288             # bytes to prefetch ahead of the weights in use
AHEAD_BETWEEN = 1024                            # and how many more between two panels


@njit(cache=True)
def _register_tile(kind, zeros, data, at, apart, table, groups, per_block, x, x_scales, corrections, capacity, base, token,
                   row_scales, row, totals, column, ahead, end, jump, largest):
    """One tile of 16 rows or two, whose weights start at data[at] and ``apart`` bytes behind it, for some tokens; added to ``totals``.

    Token t is row base + t of the activations, ``row`` the first of the weights'. Prefetches ``ahead`` bytes ahead, from data[end]
    on ``jump`` bytes further.
    """
    first = simd.multiply(simd.load(row_scales, row), simd.splat(FIXED))
    second = simd.multiply(simd.load(row_scales, row + LANES), simd.splat(FIXED))
    chain, left, per_unit = simd.tile_clear(zeros), per_block, units_of(per_block)
    line0, line1, out = int8.load_bytes(data, at), int8.load_bytes(data, at + apart), token * WIDTH + column
    where, place = base + token, 0
    for pair in range((groups + 1) // 2):
        later = ahead + jump if at + ahead >= end else ahead
        if pair % int8.line_pairs_of(kind) == 0:
            line0, line1 = int8.load_line(zeros, 0, data, at, later), int8.load_line(zeros, 1, data, at + apart, later)
            at += int8.BYTES
        raw = int8.load_raw(kind, zeros, data, at, apart, later)
        at += int8.vectors_of(kind) * int8.BYTES
        counts = int8.counts_start(kind, zeros, corrections, where * UNIT + place, UNIT)
        counts = int8.dots(kind, counts, raw, apart, 0, table, x, where * UNIT_BYTES + place * GROUP, UNIT_BYTES)
        chain = int8.tile_fma_counts(chain, counts, int8.factors_of(kind, line0, 0), int8.factors_of(kind, line1, 0), x_scales,
                                     where * UNIT + place, UNIT)
        left, place = left - 1, place + 1
        if left == 0:
            largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
            chain, left = simd.tile_clear(zeros), per_block
        if place == per_unit:
            where, place = where + capacity, 0
        # The last group may only complete a pair: it has no activations of its own.
        if 2 * pair + 1 == groups:
            break
        counts = int8.counts_start(kind, zeros, corrections, where * UNIT + place, UNIT)
        counts = int8.dots(kind, counts, raw, apart, 1, table, x, where * UNIT_BYTES + place * GROUP, UNIT_BYTES)
        chain = int8.tile_fma_counts(chain, counts, int8.factors_of(kind, line0, 1), int8.factors_of(kind, line1, 1), x_scales,
                                     where * UNIT + place, UNIT)
        line0, line1 = int8.next_line(kind, line0), int8.next_line(kind, line1)
        left, place = left - 1, place + 1
        if left == 0:
            largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
            chain, left = simd.tile_clear(zeros), per_block
        if place == per_unit:
            where, place = where + capacity, 0
    if left < per_block:
        largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
    return largest


@njit(cache=True)
def units_of(per_block):
    """Groups of a unit: whole blocks, at most eight groups."""
    return UNIT // per_block * per_block


@njit(cache=True)
def integer_panel(kind, data, at, tile_bytes, tiles, table, groups, per_block, x, x_scales, corrections, capacity, base, rows,
                  row_scales, row, totals, following, largest):
    """A panel of one or two tiles of 16 rows, whose weights start at data[at], for rows base … of the activations; added to
    ``totals``. ``following``: where in ``data`` those lie that are read next.
    """
    # Not a bare 0: Numba would compile a register tile for a literal first, and then again.
    done = np.int64(0)
    if TILES == tiles:
        end = at + tile_bytes
        while done + WIDE <= rows:
            largest = _register_tile(kind, simd.tile_zeros(WIDE, TILES), data, at, tile_bytes, table, groups, per_block, x, x_scales,
                                     corrections, capacity, base, done, row_scales, row, totals, np.int64(0), AHEAD_MANY, end,
                                     following - end, largest)
            done += WIDE
    end = at + tiles * tile_bytes
    for number in range(tiles):
        token, column, ahead = done, LANES * number, AHEAD_ONE if rows < WIDE else AHEAD_MANY
        while token + MIDDLE <= rows:
            largest = _register_tile(kind, simd.tile_zeros(MIDDLE, 1), data, at, tile_bytes, table, groups, per_block, x, x_scales,
                                     corrections, capacity, base, token, row_scales, row + column, totals, column, ahead, end,
                                     following - end, largest)
            token += MIDDLE
        while token + 2 <= rows:
            largest = _register_tile(kind, simd.tile_zeros(2, 1), data, at, tile_bytes, table, groups, per_block, x, x_scales,
                                     corrections, capacity, base, token, row_scales, row + column, totals, column, ahead, end,
                                     following - end, largest)
            token += 2
        if token < rows:
            largest = _register_tile(kind, simd.tile_zeros(1, 1), data, at, tile_bytes, table, groups, per_block, x, x_scales,
                                     corrections, capacity, base, token, row_scales, row + column, totals, column, ahead, end,
                                     following - end, largest)
        at += tile_bytes
    return largest
