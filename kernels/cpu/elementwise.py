"""Norms, activation quantisation, RoPE, SiLU and the ends of products on the CPU.

Every function works on the first ``rows`` rows of its arrays, writes into arrays that the caller owns, and returns
``OK``, ``NOT_FINITE`` or ``OUT_OF_RANGE``. Reductions over a row are integer maxima or fixed-point integer sums.
"""

import numpy as np
from numba import njit

from ..numerics import FIXED, GROUP, INFINITY_BITS, NOT_FINITE, OK, OUT_OF_RANGE, OUTPUT_LIMIT, TINY, UNFIXED
from .functions import half_bits, half_value, sigmoid
from .simd import float_from_bits, fma_scalar, rint

_ONE, _Q = np.float32(1), np.float32(127)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LOWEST_SCALE_BITS = np.int32(27 << 23)         # 2**-100


@njit(cache=True)
def _largest_magnitude(bits, first, last):
    """Maximum of the absolute bit patterns of bits[first:last] (int32 view of float32)."""
    largest = np.int32(0)
    for i in range(first, last):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@njit(cache=True, error_model="numpy")
def rms_norm(x, weight, eps, out, rows):
    """out[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight for float32 [rows, n] (RMSNorm, Zhang & Sennrich 2019).

    x is scaled by a power of two from its exact maximum, so that squares neither overflow nor vanish, and the squares
    are summed as 64-bit fixed point. ``out`` may be ``x``.
    """
    n = x.shape[1]
    for r in range(rows):
        row = x[r]
        largest = _largest_magnitude(row.view(np.int32), 0, n)
        if largest >= INFINITY_BITS:
            return NOT_FINITE
        exponent = max(largest & np.int32(0x7F800000), _LOWEST_SCALE_BITS)
        unit = float_from_bits(exponent)
        inverse = _ONE / unit
        total = np.int64(0)
        for i in range(n):
            scaled = row[i] * inverse
            total += np.int64(rint((scaled * scaled) * FIXED))
        mean = (np.float64(total) * UNFIXED / n) * (np.float64(unit) * np.float64(unit)) + eps
        factor = np.float32(1.0 / np.sqrt(mean))
        for i in range(n):
            out[r, i] = (row[i] * factor) * weight[i]
    return OK


@njit(cache=True, error_model="numpy")
def quantize_rows(x, block, out, scales, rows):
    """Per row and group of 32 k: out = rint(x * (127 / amax)) as whole float32, scale = amax / 127.

    x is float32 [rows, K]; groups start afresh every ``block`` k; out is float32 [rows, groups * 32] with zeros in the
    gaps, scales float32 [rows, groups]. A group whose maximum is below 2**-100 is zero.
    """
    k_end = x.shape[1]
    for r in range(rows):
        row = x[r]
        bits = row.view(np.int32)
        group = 0
        for start in range(0, k_end, block):
            stop = min(start + block, k_end)
            for first in range(start, stop, GROUP):
                last = min(first + GROUP, stop)
                largest = _largest_magnitude(bits, first, last)
                if largest >= INFINITY_BITS:
                    return NOT_FINITE
                amax = float_from_bits(largest)
                small = amax < TINY
                inverse = np.float32(0) if small else _Q / amax
                scales[r, group] = np.float32(0) if small else amax / _Q
                base = group * GROUP
                for i in range(last - first):
                    out[r, base + i] = rint(row[first + i] * inverse)
                for i in range(last - first, GROUP):
                    out[r, base + i] = np.float32(0)
                group += 1
    return OK


@njit(cache=True, error_model="numpy")
def quantize_rows_int8(x, block, out, scales, corrections, rows):
    """As ``quantize_rows``, for the int8 products: by reduction block, in their order of k, with -128 * each group's sum.

    out is int8 [blocks, capacity, groups of a block * 32], scales float32 and corrections int32 [blocks, capacity, groups of
    a block].
    """
    k_end = x.shape[1]
    for r in range(rows):
        row = x[r]
        bits = row.view(np.int32)
        for b in range(out.shape[0]):
            stop = min((b + 1) * block, k_end)
            for group in range(scales.shape[2]):
                first = b * block + group * GROUP
                if first >= stop:
                    break
                last = min(first + GROUP, stop)
                largest = _largest_magnitude(bits, first, last)
                if largest >= INFINITY_BITS:
                    return NOT_FINITE
                amax = float_from_bits(largest)
                small = amax < TINY
                inverse = np.float32(0) if small else _Q / amax
                scales[b, r, group] = np.float32(0) if small else amax / _Q
                total = np.int32(0)
                for i in range(GROUP):
                    value = np.int32(rint(row[first + i] * inverse)) if first + i < last else np.int32(0)
                    total += value
                    out[b, r, group * GROUP + i // 8 * 8 + i % 2 * 4 + i % 8 // 2] = value
                corrections[b, r, group] = np.int32(-128) * total
    return OK


@njit(cache=True)
def finish(sums, bias, out, rows):
    """out[r, n] = float32(sums[r, n] * 2**-32) + bias[n]; ``bias`` is float32 [N], or empty. sums is int64 [rows, ≥ N]."""
    status = OK
    for r in range(rows):
        for n in range(out.shape[1]):
            y = np.float32(np.float64(sums[r, n]) * UNFIXED)
            if not abs(y) < OUTPUT_LIMIT:
                status = OUT_OF_RANGE
            out[r, n] = y
        for n in range(bias.shape[0]):
            out[r, n] += bias[n]
    return status


@njit(cache=True)
def finish_add(sums, bias, out, rows):
    """out[r, n] += float32(sums[r, n] * 2**-32) + bias[n]: the end of a row-parallel product, into the residual."""
    status = OK
    biased = bias.shape[0] > 0
    for r in range(rows):
        for n in range(out.shape[1]):
            y = np.float32(np.float64(sums[r, n]) * UNFIXED)
            if not abs(y) < OUTPUT_LIMIT:
                status = OUT_OF_RANGE
            if biased:
                y += bias[n]
            out[r, n] += y
    return status


@njit(cache=True)
def silu_multiply(gate, up, out, rows):
    """out = (gate * sigmoid(gate)) * up, float32 [rows, n] (SwiGLU, Shazeer 2020). ``out`` may be ``gate``."""
    for r in range(rows):
        for i in range(gate.shape[1]):
            g = gate[r, i]
            out[r, i] = (g * sigmoid(g)) * up[r, i]
    return OK


@njit(cache=True)
def rope(x, cosines, sines, positions, rows):
    """Rotates float32 [rows, heads * head_dim] in place (RoFormer, Su et al. 2021; half-split pairs).

    cosines and sines are float32 [positions, head_dim / 2]; positions int32 [rows].
    """
    half = cosines.shape[1]
    for r in range(rows):
        c, s = cosines[positions[r]], sines[positions[r]]
        for first in range(0, x.shape[1], 2 * half):
            for i in range(half):
                a, b = x[r, first + i], x[r, first + half + i]
                x[r, first + i] = fma_scalar(-b, s[i], a * c[i])
                x[r, first + half + i] = fma_scalar(a, s[i], b * c[i])
    return OK


@njit(cache=True)
def to_half(x, out, rows):
    """out = the bits of float16(x), uint16 [rows, n]; ``OUT_OF_RANGE`` where the value is not finite as a float16."""
    status = OK
    for r in range(rows):
        for i in range(x.shape[1]):
            bits = half_bits(x[r, i])
            if bits & np.uint16(0x7C00) == np.uint16(0x7C00):
                status = OUT_OF_RANGE
            out[r, i] = bits
    return status


@njit(cache=True)
def float_embedding(values, columns, tokens, first, rows_held, out, rows):
    """out[r] = row tokens[r] of a float table held from row ``first`` on; zeros where the token lies elsewhere."""
    for r in range(rows):
        row = tokens[r] - first
        held = 0 <= row < rows_held
        for k in range(columns):
            out[r, k] = values[row // 16, k, row % 16] if held else np.float32(0)
    return OK


@njit(cache=True)
def integer_embedding(values, factors, row_scales, columns, tokens, first, rows_held, out, rows):
    """As ``float_embedding`` for quantised rows: (value * factor) * row scale."""
    for r in range(rows):
        row = tokens[r] - first
        held = 0 <= row < rows_held
        for k in range(columns):
            if held:
                tile, lane = row // 16, row % 16
                out[r, k] = (np.float32(values[tile, k, lane]) * factors[tile, k // GROUP, lane]) * row_scales[row]
            else:
                out[r, k] = np.float32(0)
    return OK


@njit(cache=True)
def byte_embedding(values, factors, row_scales, columns, tokens, first, rows_held, out, rows):
    """As ``integer_embedding`` for bytes in the order of the int8 products and float16 factors."""
    for r in range(rows):
        row = tokens[r] - first
        held = 0 <= row < rows_held
        for k in range(columns):
            if held:
                tile, lane = row // 16, row % 16
                byte = values[tile, k // 8 * 2 + k % 2, lane * 4 + k % 8 // 2]
                value = np.float32((np.int32(byte) & 255) - 128)
                out[r, k] = (value * half_value(factors[tile, k // GROUP, lane])) * row_scales[row]
            else:
                out[r, k] = np.float32(0)
    return OK
