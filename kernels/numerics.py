"""The canonical arithmetic: its constants, and the plain NumPy form of every rule.

Floating-point sums depend on their order, and a parallel program changes the order. Therefore a float sum never
crosses a reduction block: inside a block it is one chain of fused multiply-adds in ascending order, and block values
are added as 64-bit fixed point, which is exact. Functions are polynomials over correctly rounded operations. Every
backend follows these definitions bit by bit, so a result depends on the model and the request alone.

All functions here are elementwise over arrays of any shape and use only operations that IEEE 754 rounds correctly
(+, -, x, /, sqrt, rint, conversions) and integer operations, so their bits are the same on every machine.
"""

from decimal import Decimal, localcontext

import numpy as np

GROUP = 32                      # consecutive k that share one activation scale and one weight factor
BLOCK = 256                     # k per reduction block, where a layer is not cut along k
ATTENTION_BLOCK = 256           # positions per attention block, starting at absolute multiples
PAGE = 16                       # positions per page of the KV cache
FIXED = np.float32(2.0**32)     # fixed-point scale of block values
UNFIXED = 2.0**-32
BLOCK_LIMIT = np.float32(2.0**19)
OUTPUT_LIMIT = np.float32(2.0**20)
MAX_BLOCKS = 4096
TINY = np.float32(2.0**-100)    # an activation group whose maximum is below this is zero
INFINITY_BITS = 0x7F800000

# What a kernel returns: 0, or the reason why its output cannot be trusted.
OK, NOT_FINITE, OUT_OF_RANGE = 0, 1, 2

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693145751953125)        # 15 bits: n * LN2_HIGH is exact for |n| < 512
LN2_LOW = np.float32(1.4286068203094173e-06)
EXP_LOWEST, EXP_HIGHEST = np.float32(-87.0), np.float32(88.0)
EXP_COEFFICIENTS = tuple(np.float32(1.0 / d) for d in (5040, 720, 120, 24, 6, 2, 1, 1))
LN2 = 0.6931471805599453


def down_block(intermediate_size: int) -> int:
    """k per reduction block of the FFN's down projection: 256, or less where that leaves fewer than 16 blocks to deal out."""
    for block in (256, 128, 64):
        if -(-intermediate_size // block) >= 16:
            return block
    return 32


def fma(a, b, c):
    """Correctly rounded float32 a * b + c: the exact product in float64, the sum rounded to odd, then to float32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = np.asarray(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((np.abs(error) > 0) & (bits & 1 == 0), bits + step, bits)
    return odd.view(np.float64).astype(np.float32)


def exp(x):
    """float32 e**x within 1 ulp: 0 below -87, e**88 above 88, NaN for NaN; Taylor to degree 7 on [-ln2/2, ln2/2]."""
    x = np.asarray(x, np.float32)
    clamped = np.clip(x, EXP_LOWEST, EXP_HIGHEST)
    n = np.rint(clamped * LOG2E)
    r = fma(-n, LN2_HIGH, clamped)
    r = fma(-n, LN2_LOW, r)
    p = np.full(x.shape, EXP_COEFFICIENTS[0], np.float32)
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = fma(p, r, coefficient)
    scale = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(x < EXP_LOWEST, np.float32(0), p * scale)


def sigmoid(x):
    """float32 1 / (1 + e**-x), without overflow on either side."""
    x = np.asarray(x, np.float32)
    e = exp(-np.abs(x))
    return np.where(x >= 0, np.float32(1), e) / (np.float32(1) + e)


def log(x: float) -> float:
    """float64 natural logarithm of a positive normal number, by the series of artanh."""
    bits = int(np.float64(x).view(np.int64))
    exponent = (bits >> 52) - 1023
    mantissa = float(np.int64((bits & ((1 << 52) - 1)) | (1023 << 52)).view(np.float64))
    if mantissa > 1.4142135623730951:
        mantissa, exponent = mantissa * 0.5, exponent + 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, p = s * s, 0.0
    for n in range(23, 0, -2):
        p = p * square + 1.0 / n
    return exponent * LN2 + 2.0 * s * p


def log_probability(logit: float, maximum: float, total: int) -> np.float32:
    """log softmax of one logit; ``total`` is the sum of rint(exp(l - maximum) * 2**32) over the vocabulary."""
    value = (float(logit) - float(maximum)) - log(float(total) * UNFIXED)
    return np.float32(value) + np.float32(0)


def pi() -> Decimal:
    """Pi in the current decimal context, by Machin's formula."""
    def arctan_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k, square = 1, n * n
        while True:
            power = -power / square
            k += 2
            if total + power / k == total:
                return total
            total += power / k
    return 4 * (4 * arctan_inverse(5) - arctan_inverse(239))


def turn_fraction(radians: Decimal) -> int:
    """An angle in radians as a 64-bit fraction of a turn, rounded to nearest: multiples wrap exactly in uint64."""
    with localcontext() as context:
        context.prec = 60
        return int((radians / (2 * pi()) * 2**64).to_integral_value()) % 2**64


def cos_sin(turns):
    """float32 cosine and sine of angles given as uint64 fractions of a turn.

    The nearest quarter turn is split off exactly; the rest, within an eighth, goes through Taylor polynomials in float64.
    """
    turns = np.asarray(turns, np.uint64)
    quarter = (turns + np.uint64(1 << 61)) >> np.uint64(62)
    rest = (turns - (quarter << np.uint64(62))).view(np.int64)
    angle = rest.astype(np.float64) * (6.283185307179586 * 2.0**-64)
    square = angle * angle
    cosine, sine = np.zeros(turns.shape), np.zeros(turns.shape)
    for n in range(18, 0, -2):
        cosine = (cosine + 1.0) * (square * (-1.0 / (n * (n - 1))))
        sine = (sine + 1.0) * (square * (-1.0 / (n * (n + 1))))
    cosine, sine = cosine + 1.0, (sine + 1.0) * angle
    swap = (quarter & np.uint64(1)).astype(bool)
    c = np.where(swap, sine, cosine)
    s = np.where(swap, cosine, sine)
    c = np.where((quarter == 1) | (quarter == 2), -c, c)
    s = np.where((quarter == 2) | (quarter == 3), -s, s)
    return c.astype(np.float32), s.astype(np.float32)


def rope_table(turns_per_position, positions: int, scale: float = 1.0):
    """cos and sin tables, float32 [positions, head_dim / 2], from uint64 turns a position; ``scale`` multiplies both (YaRN)."""
    steps = np.asarray(turns_per_position, np.uint64)
    cosines, sines = np.empty((positions, len(steps)), np.float32), np.empty((positions, len(steps)), np.float32)
    # In pieces: the float64 steps on the way take many times the memory of the tables.
    for first in range(0, positions, 1024):
        part = slice(first, min(first + 1024, positions))
        c, s = cos_sin(np.arange(part.start, part.stop, dtype=np.uint64)[:, None] * steps)
        cosines[part], sines[part] = c * np.float32(scale), s * np.float32(scale)
    return cosines, sines
