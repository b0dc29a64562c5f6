"""Panels: the products of up to 32 rows of quantised weights (two tiles of 16) with some tokens, as int64 totals.

Activations lie by units of eight groups (256 k): x int8 [units, capacity, 256], x_scales float32 and corrections int32 [units,
capacity, 8]; tokens of a unit are neighbours in the caches. Totals are int64 [panels, tokens, 32], the sum over reduction blocks
of rint(block value * 2**32).

Weights are decoded in registers, in the order in which they stream from memory, anew for each register tile: one lookup serves
the dot products of all its tokens, and nothing is written back. For many tokens ``panels_wide`` decodes them once.
"""

import numpy as np
from numba import njit

from ..numerics import FIXED, GROUP
from . import simd, target
from . import simd_int8 as int8
from . import simd_weights as coded
from .memory import float32_at
from .panels_wide import REST, TOKENS, wide_panel

LANES = simd.LANES
WIDTH = 2 * LANES               # rows of a panel
UNIT = int8.UNIT                # groups of a unit
UNIT_BYTES = UNIT * GROUP
# Register tiles, whose counts and chains nearly fill 32 registers of 16 rows, or 16 of 8 or of 4: tokens with two tiles of 16
# rows, which share the loads of activations (0: not worth it), and with one.
PAIR, SINGLE = {512: (6, 4), 256: (0, 4)}.get(target.vector_bits(), (0, 2))
WIDE = PAIR or SINGLE           # tokens from which on arithmetic takes longer than reading weights
WIDE_FROM = 2 * TOKENS          # tokens from which on weights are decoded once for all
AHEAD_ONE, AHEAD_MANY = 7680, 12288             # bytes to prefetch ahead of the weights in use
AHEAD_BETWEEN = 1024                            # and how many more before something else than multiplying is done


@njit(cache=True)
def _register_tile(kind, zeros, given, at, apart, where, row_scales, out, ahead, end, jump, largest):
    """One tile of 16 rows or two, whose weights start at data[at] and ``apart`` bytes behind it, for some tokens; added to
    totals[out …].

    ``given``: see ``integer_panels``; ``where``: the first token's row of the activations. Prefetches ``ahead`` bytes ahead, from
    data[end] on ``jump`` bytes further.
    """
    data, table, groups, per_block, x, x_scales, corrections, capacity, totals = given
    first = simd.multiply(simd.load(row_scales, 0), simd.splat(FIXED))
    second = simd.multiply(simd.load(row_scales, LANES), simd.splat(FIXED))
    chain, left, per_unit = simd.tile_clear(zeros), per_block, units_of(per_block)
    line0, line1, place = coded.load_bytes(data, at), coded.load_bytes(data, at + apart), 0
    for pair in range((groups + 1) // 2):
        later = ahead + jump if at + ahead >= end else ahead
        if pair % coded.line_pairs_of(kind) == 0:
            line0, line1 = coded.load_line(zeros, 0, data, at, later), coded.load_line(zeros, 1, data, at + apart, later)
            at += coded.BYTES
        raw = coded.load_raw(kind, zeros, data, at, apart, later)
        at += coded.vectors_of(kind) * coded.BYTES
        counts = int8.counts_start(kind, zeros, corrections, where * UNIT + place, UNIT)
        counts = int8.dots(kind, counts, raw, apart, 0, table, x, where * UNIT_BYTES + place * GROUP, UNIT_BYTES)
        chain = int8.tile_fma_counts(chain, counts, coded.factors_of(kind, line0, 0), coded.factors_of(kind, line1, 0), x_scales,
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
        chain = int8.tile_fma_counts(chain, counts, coded.factors_of(kind, line0, 1), coded.factors_of(kind, line1, 1), x_scales,
                                     where * UNIT + place, UNIT)
        line0, line1 = coded.next_line(kind, line0), coded.next_line(kind, line1)
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
def _tiles(kind, zeros, given, at, tile_bytes, count, where, row_scales, out, panel_size, ahead, end, jump, largest):
    """``count`` tiles of 16 rows, one behind the other, for the same tokens; ``panel_size``: totals from panel to panel."""
    for number in range(count):
        largest = _register_tile(kind, zeros, given, at, tile_bytes, where, float32_at(row_scales + 4 * LANES * number),
                                 out + number // 2 * panel_size + number % 2 * LANES, ahead, end, jump, largest)
        at += tile_bytes
    return largest


@njit(cache=True)
def units_of(per_block):
    """Groups of a unit: whole blocks, at most eight groups."""
    return UNIT // per_block * per_block


@njit(cache=True)
def integer_panels(kind, given, at, tile_bytes, count, base, rows, row_scales, following, scratch, largest):
    """``count`` tiles of 16 rows, whose weights start at data[at], for rows base … of the activations; added to ``totals``.

    ``given``: data; table, groups and groups of a block of the weights; x, x_scales, corrections and capacity; totals [panels,
    rows, 32]. ``row_scales``: an address. ``following``: where in ``data`` those weights lie that are read next;
    ``scratch``: address of SCRATCH_BYTES of ``panels_wide``.
    """
    # Not a bare 0: Numba would compile a register tile for a literal first, and then again.
    done, size = np.int64(0), rows * WIDTH
    if PAIR and count == 2 and rows >= WIDE_FROM and UNIT % given[3] == 0:
        done = rows // TOKENS * TOKENS + (REST if rows % TOKENS >= REST else 0)
        largest = wide_panel(kind, given, at, tile_bytes, base, done, row_scales, following, scratch, largest)
    elif PAIR and count == 2:
        end = at + tile_bytes
        while done + PAIR <= rows:
            largest = _register_tile(kind, simd.tile_zeros(PAIR, 2), given, at, tile_bytes, base + done, float32_at(row_scales),
                                     done * WIDTH, AHEAD_MANY, end, following - end, largest)
            done += PAIR
    if done == rows:
        return largest
    end, ahead = at + count * tile_bytes, AHEAD_ONE if rows < WIDE else AHEAD_MANY
    # All tiles in one go where one register tile holds the tokens that are left; else each tile for some tokens, then for others.
    together = count if rows - done in (1, 2, SINGLE) else 1
    for number in range(0, count, together):
        token, out, scales = done, number // 2 * size + number % 2 * LANES, row_scales + 4 * LANES * number
        while token + SINGLE <= rows:
            largest = _tiles(kind, simd.tile_zeros(SINGLE, 1), given, at, tile_bytes, together, base + token, scales,
                             out + token * WIDTH, size, ahead, end, following - end, largest)
            token += SINGLE
        while token + 2 <= rows:
            largest = _tiles(kind, simd.tile_zeros(2, 1), given, at, tile_bytes, together, base + token, scales,
                             out + token * WIDTH, size, ahead, end, following - end, largest)
            token += 2
        if token < rows:
            largest = _tiles(kind, simd.tile_zeros(1, 1), given, at, tile_bytes, together, base + token, scales,
                             out + token * WIDTH, size, ahead, end, following - end, largest)
        at += together * tile_bytes
    return largest
