"""Quantising weights: the plain NumPy truth of the rules that ``cpu.quantize`` follows bit by bit.

``q3_5`` works in sixteenths of a codebook unit. A row is scaled so that its maximum is 127 units. A group is tried with
each of the 16 factors: its weights become integers ``x``, each pair is rounded to whole units and takes the codebook
entry nearest to that point, and the factor with the least squared error (in integers, times the factor's square) wins.
Ties go to the lowest index. Rows and groups depend on nothing but themselves, their row's maximum and the codebook.

``q4`` scales a group so that its maximum is 2**14 and rounds it to integers ``x``. Each of a few factors turns x into
values q of -8 … 7, and least squares turn q into the best factor, sum(x q) / sum(q q); the q with the least error left,
that is the largest sum(x q)**2 / sum(q q), gives the factor (an exact comparison up to one rounding; the first wins a
tie). The values are the weights divided by that factor, rounded.
"""

import numpy as np

from .formats import CODEBOOK_SIZE, FACTORS, LARGEST_WEIGHT, PAIRS, Blocks, Packed, pack_codes, pack_int4
from .numerics import GROUP, INFINITY_BITS

UNIT_BITS = 4                                   # fixed-point bits of x below one codebook unit
LIMIT = 255 << UNIT_BITS                        # x is clipped to twice the codebook's range: errors fit int32
INVERSES = np.float32(1 << UNIT_BITS) / FACTORS
SQUARES = FACTORS.astype(np.float64) ** 2       # exact
LARGEST = 127
ERROR_SHIFT = 8                                 # of the error sums, which rank cells only
INT4_UNIT = np.float32(2.0**14)                 # the maximum of a q4 group in fixed point
INT4_TINY = np.float32(2.0**-40)                # a q4 group whose maximum is below this is zero: so is its float16 factor
# Where the largest weight of a q4 group comes to lie: on the side of -8, which has one value more.
INT4_LEVELS = np.array([-8, -7.75, -8.25, -7.375, -8.625, -7.125, -9, -6.75], np.float32) / INT4_UNIT


def row_maxima(w) -> np.ndarray:
    """Bits (uint32 [n]) of each row's largest magnitude in float32 [n, k]; column shards combine by maximum."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits.max(axis=1, initial=0)


def row_scales(maxima) -> np.ndarray:
    """float16 bits (uint16) of the row scales: row maximum / 127 rounded up, so that no row passes 127 units.

    Raises ValueError where a row holds NaN or infinity, or is too large for float16.
    """
    maxima = np.asarray(maxima, np.uint32)
    check_range(maxima, "q3_5")
    scales = maxima.view(np.float32) / np.float32(LARGEST)
    rounded = scales.astype(np.float16)
    return rounded.view(np.uint16) + (rounded.astype(np.float32) < scales)


def check_range(maxima, weights_format: str) -> None:
    """Raises ValueError unless all row maxima (float32 bits) are finite and within ``LARGEST_WEIGHT``."""
    if not maxima.size:
        return
    worst, limit = np.argmax(maxima), LARGEST_WEIGHT[weights_format]
    largest = maxima[worst]
    if largest >= INFINITY_BITS:
        raise ValueError(f"row {worst} of the weights holds NaN or infinity")
    if largest.view(np.float32) > limit:
        raise ValueError(f"row {worst} of the weights reaches {largest.view(np.float32):.3g}; {weights_format} holds up to "
                         f"{limit}, for its numbers or scales are float16")


def inverse_scales(scales) -> np.ndarray:
    """float32 reciprocals of float16 bits, 0 for 0."""
    scales = scales.view(np.float16).astype(np.float32)
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)


def choose(v, codebook) -> tuple[int, np.ndarray, np.ndarray]:
    """Factor index, codes uint8 [16] and fixed-point weights int32 [16, 2] of a group ``v``, float32 [32] in units."""
    x = np.clip(np.rint(v * INVERSES[:, None]), -LIMIT, LIMIT).astype(np.int32).reshape(-1, PAIRS, 2)
    entries = codebook.astype(np.int32)
    point = np.clip((x + (1 << UNIT_BITS - 1)) >> UNIT_BITS, -LARGEST, LARGEST)
    codes = ((point[:, :, None, :] - entries) ** 2).sum(axis=-1).argmin(axis=-1)
    errors = ((x - (entries[codes] << UNIT_BITS)) ** 2).sum(axis=(1, 2))
    factor = int(np.argmin(errors * SQUARES))
    return factor, codes[factor].astype(np.uint8), x[factor]


def quantize_q3_5(w, blocks: Blocks, codebook, maxima) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    ``codebook``: int8 [128, 2] with (0, 0) as entry 0, of the whole tensor. ``maxima``: ``row_maxima`` of whole rows.
    Raises ValueError for weights that are not finite or too large for float16 scales.
    """
    scales = row_scales(maxima)
    v = blocks.pad(w) * inverse_scales(scales)[:, None, None]
    factors = np.zeros(v.shape[:2], np.uint8)
    codes = np.zeros((*v.shape[:2], PAIRS), np.uint8)
    for at in np.ndindex(factors.shape):
        factors[at], codes[at], _ = choose(v[at], codebook)
    return Packed("q3_5", len(v), blocks, pack_codes(codes), factors, scales, codebook)


def quantize_q8(w, blocks: Blocks) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    A group's factor is float16(maximum / 127), its values rint(w / factor) within ±127, zeros where the factor is 0.
    Raises ValueError for weights that are not finite or too large for float16 factors.
    """
    v = blocks.pad(w)
    maxima = row_maxima(v.reshape(-1, GROUP)).reshape(v.shape[:2])
    check_range(maxima.max(axis=1, initial=0), "q8")
    scales = (maxima.view(np.float32) / np.float32(LARGEST)).astype(np.float16)
    factors = scales.astype(np.float32)[:, :, None]
    values = np.divide(v, factors, out=np.zeros_like(v), where=factors > 0)
    codes = np.clip(np.rint(values), -LARGEST, LARGEST).astype(np.int8)
    return Packed("q8", len(v), blocks, codes, scales.view(np.uint16))


def quantize_q4(w, blocks: Blocks) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    A group's factor is chosen as the module says and rounded to float16; its values are rint(w / factor) within -8 … 7,
    zeros where the factor is 0. Raises ValueError for weights that are not finite or too large for float16 factors.
    """
    v = blocks.pad(w)
    maxima = row_maxima(v.reshape(-1, GROUP)).reshape(v.shape[:2])
    check_range(maxima.max(axis=1, initial=0), "q4")
    largest = maxima.view(np.float32)
    inverse = np.divide(INT4_UNIT, largest, out=np.zeros_like(largest), where=largest >= INT4_TINY)
    x = np.rint(v * inverse[:, :, None]).astype(np.int32)
    sign = np.where(x.max(axis=2) >= -x.min(axis=2), np.float32(1), np.float32(-1))
    most, chosen = np.full(largest.shape, -1.0), np.zeros_like(largest)
    for level in INT4_LEVELS:
        q = np.clip(np.rint(x.astype(np.float32) * (sign * level)[:, :, None]), -8, 7).astype(np.int32)
        products, squares = (x * q).sum(axis=2), np.maximum((q * q).sum(axis=2), 1)
        gain = products.astype(np.float64) ** 2 / squares
        better = gain > most
        most[better], chosen[better] = gain[better], (products.astype(np.float32) / squares.astype(np.float32))[better]
    scales = int4_factors(chosen * (largest / INT4_UNIT))
    factors = scales.view(np.float16).astype(np.float32)[:, :, None]
    values = np.divide(v, factors, out=np.zeros_like(v), where=factors != 0)
    return Packed("q4", len(v), blocks, pack_int4(np.clip(np.rint(values), -8, 7).astype(np.int8)), scales)


def int4_factors(factors) -> np.ndarray:
    """float16 bits (uint16) of float32 factors, the largest finite ones for larger."""
    return np.clip(factors, np.float32(-65504), np.float32(65504)).astype(np.float16).view(np.uint16)


def quantize_f16(w) -> np.ndarray:
    """float16 bits (uint16 [n, k]) of float32 weights, rounded half to even. Raises ValueError for what does not fit."""
    check_range(row_maxima(w), "f16")
    return np.asarray(w, np.float32).astype(np.float16).view(np.uint16)


def cell_sums(v, weights, codebook, threads: int = 1) -> np.ndarray:
    """What one Lloyd step needs: int64 [128, 4] sums over the pairs that choose each codebook entry.

    ``v``: float32 [groups, 32] in units of the row scale. ``weights``: int64 [groups], at most 2**20: the squares of
    the row scales. A pair weighs as its group times the square of the factor chosen; the sums are of the weights, of
    weight x each coordinate (in sixteenths) and of weight x squared error.
    """
    sums = np.zeros((CODEBOOK_SIZE, 4), np.int64)
    entries = codebook.astype(np.int64) << UNIT_BITS
    for group, row_weight in zip(v, weights, strict=True):
        factor, codes, x = choose(group, codebook)
        weight = np.int64(np.rint(row_weight * SQUARES[factor]))
        for code, pair in zip(codes, x.astype(np.int64), strict=True):
            error = ((pair - entries[code]) ** 2).sum()
            sums[code] += [weight, weight * pair[0], weight * pair[1], weight * error >> ERROR_SHIFT]
    return sums
