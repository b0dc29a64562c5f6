"""The canonical functions (``numerics``) as scalar Numba code that LLVM vectorises across elements."""

import numpy as np
from numba import njit

from ..numerics import EXP_COEFFICIENTS, EXP_HIGHEST, EXP_LOWEST, LN2_HIGH, LN2_LOW, LOG2E
from .simd import bits_of, float_from_bits, fma_scalar, rint

_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = EXP_COEFFICIENTS
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_HALF_UNIT = np.float32(2.0**112)


@njit(cache=True)
def exp(x):
    """float32 e**x; 0 below -87, e**88 above 88, NaN for NaN."""
    clamped = min(max(x, EXP_LOWEST), EXP_HIGHEST)
    n = rint(clamped * LOG2E)
    r = fma_scalar(-n, LN2_HIGH, clamped)
    r = fma_scalar(-n, LN2_LOW, r)
    p = fma_scalar(_C0, r, _C1)
    p = fma_scalar(p, r, _C2)
    p = fma_scalar(p, r, _C3)
    p = fma_scalar(p, r, _C4)
    p = fma_scalar(p, r, _C5)
    p = fma_scalar(p, r, _C6)
    p = fma_scalar(p, r, _C7)
    scale = float_from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return _ZERO if x < EXP_LOWEST else p * scale


@njit(cache=True, error_model="numpy")
def sigmoid(x):
    """float32 1 / (1 + e**-x), without overflow on either side."""
    e = exp(-abs(x))
    return (_ONE if x >= _ZERO else e) / (_ONE + e)


@njit(cache=True)
def half_bits(x):
    """The float16 nearest to a float32 (half to even) as uint16; 0x7C00 and above where it would not be finite."""
    bits = bits_of(x)
    magnitude = bits & np.int32(0x7FFFFFFF)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    if magnitude >= np.int32(0x477FF000):
        return np.uint16(sign | np.int32(0x7C00))
    if magnitude < np.int32(0x38800000):
        # Subnormal: adding 0.5 rounds to a multiple of 2**-24, which is the unit of subnormal float16.
        return np.uint16(sign | (bits_of(abs(x) + _HALF) - bits_of(_HALF)))
    odd = (magnitude >> np.int32(13)) & np.int32(1)
    return np.uint16(sign | ((magnitude + np.int32(0xFFF) + odd - np.int32(0x38000000)) >> np.int32(13)))


@njit(cache=True)
def half_value(bits):
    """The float32 with the value of a finite float16, given as uint16."""
    magnitude = float_from_bits(np.int32((bits & np.uint16(0x7FFF)) << 13)) * _HALF_UNIT
    return -magnitude if bits & np.uint16(0x8000) else magnitude
