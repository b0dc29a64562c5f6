"""Panels for many tokens: weights of 256 k at a time, decoded once for all register tiles.

Where blocks end with units, the products of a panel go unit by unit: its weights become bytes in the first-level cache, and all
register tiles of a chunk of tokens read them there.
"""

import numpy as np
from numba import njit

from ..numerics import FIXED, GROUP
from . import simd
from . import simd_int8 as int8
from . import simd_weights as coded
from .memory import float32_at, int8_at

LANES = simd.LANES
WIDTH = 2 * LANES
UNIT = int8.UNIT
UNIT_BYTES = UNIT * GROUP
PAIRS = UNIT // 2               # of groups, in a unit
TOKENS, REST = 6, 4             # of a register tile, and of one for those that are left
PAIR_BYTES = 2 * GROUP * LANES    # of decoded weights of 16 rows
TILE_BYTES = PAIRS * PAIR_BYTES             # and of a unit
SCRATCH_BYTES = 2 * TILE_BYTES


@njit(cache=True)
def _decode(kind, table, data, at, pairs, target):
    """A unit's weights of one tile, whose first line of factors is at data[at], as bytes at the address ``target``."""
    for pair in range(pairs):
        coded.decode_pair(kind, table, data, at + coded.BYTES + pair * coded.vectors_of(kind) * coded.BYTES, int8_at(target),
                          pair * PAIR_BYTES)


@njit(cache=True)
def _unit(kind, zeros, tokens, given, weights, lines, next_pair, apart, lines_apart, groups, where, rows, scales, out, ask,
          largest):
    """Some register tiles of ``tokens`` and 2 x 16 rows for a unit of ``groups`` groups: rows ``where`` … of the activations;
    totals[out …].

    weights, lines: addresses of the first tile's weights and factors; those of the second tile lie ``apart`` and ``lines_apart``
    bytes behind. next_pair: bytes from pair to pair. ``ask``: address and number of the cache lines to fetch meanwhile of the
    first tile; as many of the second.
    """
    _, _, _, per_block, x, x_scales, corrections, _, totals = given
    first = simd.multiply(simd.load(float32_at(scales), 0), simd.splat(FIXED))
    second = simd.multiply(simd.load(float32_at(scales), LANES), simd.splat(FIXED))
    raw, factors, asked = int8_at(weights), int8_at(lines), int8_at(ask[0])
    pairs = (groups + 1) // 2
    share, wanted = (ask[1] * tokens + rows * pairs - 1) // (rows * pairs), 0
    for row in range(where, where + rows, tokens):
        chain, left = simd.tile_clear(zeros), per_block
        line0, line1 = coded.load_bytes(factors, 0), coded.load_bytes(factors, lines_apart)
        for pair in range(pairs):
            # A few at a time: more than the processor has buffers for would hold up the arithmetic.
            for line in range(wanted, min(wanted + share, ask[1])):
                coded.prefetch_to_read(asked, line * coded.BYTES)
                coded.prefetch_to_read(asked, lines_apart + line * coded.BYTES)
            wanted += share
            if pair and coded.line_pairs_of(kind) == 1:
                line0 = coded.load_bytes(factors, pair * next_pair)
                line1 = coded.load_bytes(factors, lines_apart + pair * next_pair)
            both = coded.raw_at(kind, raw, pair * next_pair)
            counts = int8.counts_start(kind, zeros, corrections, row * UNIT + 2 * pair, UNIT)
            counts = int8.dots(kind, counts, both, apart, 0, coded.no_table(), x, row * UNIT_BYTES + 2 * pair * GROUP, UNIT_BYTES)
            chain = int8.tile_fma_indexed(kind, chain, counts, line0, line1, 0, x_scales, row * UNIT + 2 * pair, UNIT)
            left -= 1
            if left == 0:
                largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
                chain, left = simd.tile_clear(zeros), per_block
            # The last group may only complete a pair: it has no activations of its own.
            if 2 * pair + 1 == groups:
                break
            counts = int8.counts_start(kind, zeros, corrections, row * UNIT + 2 * pair + 1, UNIT)
            counts = int8.dots(kind, counts, both, apart, 1, coded.no_table(), x, row * UNIT_BYTES + (2 * pair + 1) * GROUP,
                               UNIT_BYTES)
            chain = int8.tile_fma_indexed(kind, chain, counts, line0, line1, 1, x_scales, row * UNIT + 2 * pair + 1, UNIT)
            line0, line1 = coded.next_line(kind, line0), coded.next_line(kind, line1)
            left -= 1
            if left == 0:
                largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
                chain, left = simd.tile_clear(zeros), per_block
        if left < per_block:
            largest = int8.tile_add_totals(chain, first, second, totals, out, WIDTH, largest)
        out += tokens * WIDTH
    return largest


@njit(cache=True)
def wide_panel(kind, given, at, tile_bytes, base, rows, row_scales, following, scratch, largest):
    """As ``integer_panels`` for two tiles and a multiple of TOKENS rows, or REST more, where blocks end with units.

    ``scratch``: address of SCRATCH_BYTES.
    """
    data, table, groups, _, _, _, _, capacity, _ = given
    plain, whole = coded.decoded(kind), rows // TOKENS * TOKENS
    size = (PAIRS * coded.vectors_of(kind) + PAIRS // coded.line_pairs_of(kind)) * coded.BYTES
    origin = coded.address_of(data)
    for unit in range((groups + UNIT - 1) // UNIT):
        count, here = min(UNIT, groups - unit * UNIT), at + unit * size
        later = here + size if (unit + 1) * UNIT < groups else following
        if coded.looked_up(kind):
            for tile in range(2):
                _decode(kind, table, data, here + tile * tile_bytes, (count + 1) // 2, scratch + tile * TILE_BYTES)
            weights, next_pair, apart = scratch, np.int64(PAIR_BYTES), np.int64(TILE_BYTES)
        else:
            weights, apart = origin + here + coded.BYTES, tile_bytes
            next_pair = np.int64((coded.vectors_of(kind) + 1 // coded.line_pairs_of(kind)) * coded.BYTES)
        row = base + unit * capacity
        largest = _unit(plain, simd.tile_zeros(TOKENS, 2), TOKENS, given, weights, origin + here, next_pair, apart, tile_bytes,
                        count, row, whole, row_scales, np.int64(0), (origin + later, size // coded.BYTES), largest)
        if whole < rows:
            largest = _unit(plain, simd.tile_zeros(REST, 2), REST, given, weights, origin + here, next_pair, apart, tile_bytes,
                            count, row + whole, np.int64(REST), row_scales, whole * WIDTH, (origin + later, 0), largest)
    return largest
