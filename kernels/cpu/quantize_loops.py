"""The compiled loops of ``quantize``: one function for a row or a chunk, called by a serial and by a parallel loop."""

import numpy as np
from numba import njit, prange

from ..formats import CODE_BITS, CODEBOOK_SIZE, FACTORS, PAIRS
from ..numerics import GROUP
from ..reference_quantize import ERROR_SHIFT, INT4_TINY, INT4_UNIT, LARGEST, LIMIT, UNIT_BITS

HALF = 1 << UNIT_BITS - 1
SIDE = 2 * LARGEST + 1          # points -127 … 127 in both directions
FACTOR_COUNT = len(FACTORS)
CHUNK = 256                     # groups of a sample that are summed together


@njit(cache=True)
def fill_nearest(codebook, table):
    """The entry nearest to each point; distance and index share an integer, so ties go to the lowest index."""
    along, column = np.empty((CODEBOOK_SIZE, SIDE), np.int32), np.empty(SIDE, np.int32)
    for entry in range(CODEBOOK_SIZE):
        for b in range(SIDE):
            distance = np.int32(b - LARGEST - codebook[entry, 1])
            along[entry, b] = (distance * distance) << CODE_BITS | entry
    for a in range(SIDE):
        column[:] = np.int32(0x7FFFFFFF)
        for entry in range(CODEBOOK_SIZE):
            distance = np.int32(a - LARGEST - codebook[entry, 0])
            across = np.int32((distance * distance) << CODE_BITS)
            for b in range(SIDE):
                column[b] = min(column[b], np.int32(along[entry, b] + across))
        for b in range(SIDE):
            table[a * SIDE + b] = column[b] & (CODEBOOK_SIZE - 1)


@njit(cache=True)
def _choose(v, entries, inverses, squares, scratch):
    """The factor of least error for the group ``v``, float32 [2, 16]: first and second weights of the pairs.

    ``entries``: the nearest pair for each point of the plane. Leaves in ``scratch`` (see there), at pair * factors +
    factor, the weights under every factor, the points that they fall on and their nearest pairs. Short passes, so that
    all but the lookups become vector code.
    """
    x, cells, y, errors = scratch
    _scale(v, inverses, x, cells)
    for at in range(len(cells)):
        y[at] = entries[cells[at]]
    for at in range(len(y)):
        a, b = np.int32(x[0, at] - _first(y[at])), np.int32(x[1, at] - _second(y[at]))
        errors[at] = np.int32(np.int32(a * a) + np.int32(b * b))
    least, best = np.inf, 0
    for factor in range(FACTOR_COUNT):
        error = np.int32(0)
        for pair in range(PAIRS):
            error = np.int32(error + errors[pair * FACTOR_COUNT + factor])
        if error * squares[factor] < least:
            least, best = error * squares[factor], factor
    return best


@njit(cache=True)
def _scale(v, inverses, x, cells):
    """Every weight divided by every factor, in fixed point, and the point of the plane that each pair falls on."""
    for pair in range(PAIRS):
        a, b = v[0, pair], v[1, pair]
        for factor in range(FACTOR_COUNT):
            at = pair * FACTOR_COUNT + factor
            first, second = _fixed(a * inverses[factor]), _fixed(b * inverses[factor])
            x[0, at], x[1, at] = first, second
            cells[at] = np.int32(np.int32(_point(first) * np.int32(SIDE)) + _point(second))


@njit(cache=True)
def _fixed(value):
    """A weight over a factor in fixed point: below 2**13, as rows are scaled by their maxima."""
    return _clip(np.int32(np.rint(value)), LIMIT)


@njit(cache=True)
def _point(x):
    """A fixed-point coordinate rounded to whole units, as an index of the table's side; in int32 for full vectors."""
    return np.int32(_clip(np.int32(np.int32(x + np.int32(HALF)) >> np.int32(UNIT_BITS)), LARGEST) + np.int32(LARGEST))


@njit(cache=True)
def _clip(value, limit):
    return np.int32(min(max(value, np.int32(-limit)), np.int32(limit)))


@njit(cache=True)
def _first(pair):
    """The first of two int8, in fixed point."""
    return np.int32(np.int32(np.int32(pair) << np.int32(24)) >> np.int32(24 - UNIT_BITS))


@njit(cache=True)
def _second(pair):
    """The second of two int8, in fixed point."""
    return np.int32(np.int32(np.int32(np.int32(pair) << np.int32(16)) >> np.int32(24)) << np.int32(UNIT_BITS))


@njit(cache=True)
def _scratch():
    """For every pair under every factor: fixed-point weights, point of the plane, pair chosen, squared error."""
    points = PAIRS * FACTOR_COUNT
    return (np.empty((2, points), np.int32), np.empty(points, np.uint16), np.empty(points, np.uint16),
            np.empty(points, np.int32))


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
def _pairs_row(w, inverse_scale, block, groups_per_block, nearest, entries, inverses, squares, factors, codes):
    v, chosen = np.zeros((2, PAIRS), np.float32), np.empty(PAIRS, np.uint8)
    scratch = _scratch()
    cells = scratch[1]
    for group in range(len(factors)):
        first, end = _group(group, block, groups_per_block, len(w))
        v[:] = 0
        for i in range(end - first):
            v[i & 1, i >> 1] = w[first + i] * inverse_scale
        factor = _choose(v, entries, inverses, squares, scratch)
        factors[group] = factor
        for pair in range(PAIRS):
            chosen[pair] = nearest[cells[pair * FACTOR_COUNT + factor]]
        _pack(chosen, codes[group])


@njit(cache=True)
def _group(group, block, groups_per_block, size):
    """First k of a group and the end of its k."""
    start = group // groups_per_block * block
    first = start + group % groups_per_block * GROUP
    return first, min(first + GROUP, start + block, size)


@njit(cache=True)
def pairs_serial(w, inverse, block, groups_per_block, nearest, entries, inverses, squares, factors, codes):
    for n in range(len(w)):
        _pairs_row(w[n], inverse[n], block, groups_per_block, nearest, entries, inverses, squares, factors[n], codes[n])


@njit(cache=True, parallel=True)
def pairs_parallel(w, inverse, block, groups_per_block, nearest, entries, inverses, squares, factors, codes):
    for n in prange(len(w)):
        _pairs_row(w[n], inverse[n], block, groups_per_block, nearest, entries, inverses, squares, factors[n], codes[n])


@njit(cache=True)
def _sums_chunk(v, weights, nearest, entries, inverses, squares, sums):
    pairs = np.empty((2, PAIRS), np.float32)
    scratch = _scratch()
    x, cells, y, _ = scratch
    for group in range(len(v)):
        for i in range(GROUP):
            pairs[i & 1, i >> 1] = v[group, i]
        factor = _choose(pairs, entries, inverses, squares, scratch)
        weight = np.int64(np.rint(weights[group] * squares[factor]))
        for at in range(factor, len(cells), FACTOR_COUNT):
            code, a, b = nearest[cells[at]], np.int64(x[0, at]), np.int64(x[1, at])
            sums[code, 0] += weight
            sums[code, 1] += weight * a
            sums[code, 2] += weight * b
            a -= _first(y[at])
            b -= _second(y[at])
            sums[code, 3] += weight * (a * a + b * b) >> ERROR_SHIFT


@njit(cache=True)
def sums_serial(v, weights, nearest, entries, inverses, squares, parts):
    for part in range(len(parts)):
        chunk = slice(part * CHUNK, (part + 1) * CHUNK)
        _sums_chunk(v[chunk], weights[chunk], nearest, entries, inverses, squares, parts[part])


@njit(cache=True, parallel=True)
def sums_parallel(v, weights, nearest, entries, inverses, squares, parts):
    for part in prange(len(parts)):
        chunk = slice(part * CHUNK, (part + 1) * CHUNK)
        _sums_chunk(v[chunk], weights[chunk], nearest, entries, inverses, squares, parts[part])


@njit(cache=True)
def _maximum(bits):
    largest = np.uint32(0)
    for i in range(len(bits)):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return largest


@njit(cache=True)
def maxima_serial(bits, maxima):
    for n in range(len(bits)):
        maxima[n] = _maximum(bits[n])


@njit(cache=True, parallel=True)
def maxima_parallel(bits, maxima):
    for n in prange(len(bits)):
        maxima[n] = _maximum(bits[n])


@njit(cache=True)
def _group_maxima_row(bits, block, groups_per_block, maxima):
    for group in range(len(maxima)):
        first, end = _group(group, block, groups_per_block, len(bits))
        maxima[group] = _maximum(bits[first:end])


@njit(cache=True)
def group_maxima_serial(bits, block, groups_per_block, maxima):
    for n in range(len(bits)):
        _group_maxima_row(bits[n], block, groups_per_block, maxima[n])


@njit(cache=True, parallel=True)
def group_maxima_parallel(bits, block, groups_per_block, maxima):
    for n in prange(len(bits)):
        _group_maxima_row(bits[n], block, groups_per_block, maxima[n])


@njit(cache=True)
def _int4_factors_row(w, block, groups_per_block, levels, factors):
    x = np.empty(GROUP, np.int32)
    for group in range(len(factors)):
        first, end = _group(group, block, groups_per_block, len(w))
        largest = np.float32(0)
        for k in range(first, end):
            largest = max(largest, np.float32(abs(w[k])))
        if largest < INT4_TINY:
            continue
        inverse, above, below = INT4_UNIT / largest, np.int32(0), np.int32(0)
        x[:] = 0
        for i in range(end - first):
            x[i] = np.int32(np.rint(w[first + i] * inverse))
            above, below = max(above, x[i]), min(below, x[i])
        sign = np.float32(1) if above >= -below else np.float32(-1)
        factors[group] = _int4_factor(x, sign, levels) * (largest / INT4_UNIT)


@njit(cache=True)
def _int4_factor(x, sign, levels):
    """The factor of least error for fixed-point weights int32 [32]: see ``reference_quantize``."""
    most, factor = -1.0, np.float32(0)
    for level in levels:
        scale, products, squares = sign * level, np.int32(0), np.int32(0)
        for i in range(GROUP):
            q = np.int32(min(max(np.rint(np.float32(x[i]) * scale), np.float32(-8)), np.float32(7)))
            products = np.int32(products + np.int32(x[i] * q))
            squares = np.int32(squares + np.int32(q * q))
        gain = np.float64(products) * np.float64(products) / np.float64(squares)
        if gain > most:
            most, factor = gain, np.float32(products) / np.float32(squares)
    return factor


@njit(cache=True)
def int4_factors_serial(w, block, groups_per_block, levels, factors):
    for n in range(len(w)):
        _int4_factors_row(w[n], block, groups_per_block, levels, factors[n])


@njit(cache=True, parallel=True)
def int4_factors_parallel(w, block, groups_per_block, levels, factors):
    for n in prange(len(w)):
        _int4_factors_row(w[n], block, groups_per_block, levels, factors[n])


@njit(cache=True)
def _integers_row(w, block, groups_per_block, factors, low, high, codes):
    for group in range(len(factors)):
        first, end = _group(group, block, groups_per_block, len(w))
        factor = factors[group]
        if factor != 0:
            for i in range(end - first):
                value = np.rint(w[first + i] / factor)
                codes[group, i] = np.int32(min(max(value, np.float32(low)), np.float32(high)))


@njit(cache=True)
def integers_serial(w, block, groups_per_block, factors, low, high, codes):
    for n in range(len(w)):
        _integers_row(w[n], block, groups_per_block, factors[n], low, high, codes[n])


@njit(cache=True, parallel=True)
def integers_parallel(w, block, groups_per_block, factors, low, high, codes):
    for n in prange(len(w)):
        _integers_row(w[n], block, groups_per_block, factors[n], low, high, codes[n])
