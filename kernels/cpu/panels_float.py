"""Panels of float32 and float16 weights: the products of up to 32 rows with some tokens, as int64 totals.

Canonical: one chain over single k in each reduction block; activations are float32 and not quantised. Weights lie interleaved
[tiles, columns, 16]. Two tiles at a time, so that one token has two chains under way.
"""

from numba import njit

from . import simd, target
from . import simd_int8 as int8
from .panels import LANES, WIDTH

TALL = 6 if target.vector_bits() == 512 else 2


@njit(cache=True)
def _register_tile(zeros, data, at0, at1, columns, block, x, offset, stride, scales, totals, out, largest):
    """Two tiles, whose weights start at data[at0] and data[at1], for the tokens of a register tile."""
    for start in range(0, columns, block):
        chain0, chain1 = simd.tile_clear(zeros), simd.tile_clear(zeros)
        for k in range(start, min(start + block, columns)):
            chain0 = simd.tile_fma(chain0, simd.load(data, at0 + k * LANES), x, offset + k, stride)
            chain1 = simd.tile_fma(chain1, simd.load(data, at1 + k * LANES), x, offset + k, stride)
        largest = int8.tile_add_totals(chain0, scales, scales, totals, out, WIDTH, largest)
        largest = int8.tile_add_totals(chain1, scales, scales, totals, out + LANES, WIDTH, largest)
    return largest


@njit(cache=True)
def float_panel(data, at0, at1, columns, block, x, stride, first, rows, scales, totals, largest):
    """A panel for rows first … of the activations x [rows, stride]; added to ``totals`` [rows, 32].

    For a panel of one tile give it twice: the second half of its totals is then a copy.
    """
    token = 0
    while token + TALL <= rows:
        largest = _register_tile(simd.tile_zeros(TALL, 1), data, at0, at1, columns, block, x, (first + token) * stride, stride,
                                 scales, totals, token * WIDTH, largest)
        token += TALL
    while token < rows:
        largest = _register_tile(simd.tile_zeros(1, 1), data, at0, at1, columns, block, x, (first + token) * stride, stride,
                                 scales, totals, token * WIDTH, largest)
        token += 1
    return largest
