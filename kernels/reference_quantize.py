"""Quantising weights: the plain NumPy truth of the rules that ``cpu.quantize`` follows bit by bit.

``q3_5`` works in sixteenths of a codebook unit. A row is scaled so that its maximum is 127 units. A group is tried with
each of the 16 factors: its weights become integers ``x``, each pair is rounded to whole units and takes the codebook
entry nearest to that point, and the factor with the least squared error (in integers, times the factor's square) wins.
Ties go to the lowest index. Rows and groups depend on nothing but themselves, their row's maximum and the codebook.
"""

import numpy as np

from .formats import CODEBOOK_SIZE, FACTORS, PAIRS, Blocks, Packed, pack_codes
from .numerics import GROUP, INFINITY_BITS

UNIT_BITS = 4                                   # fixed-point bits of x below one codebook unit
LIMIT = 255 << UNIT_BITS                        # x is clipped to twice the codebook's range: errors fit int32
INVERSES = np.float32(1 << UNIT_BITS) / FACTORS
SQUARES = FACTORS.astype(np.float64) ** 2       # exact
LARGEST = 127
ERROR_SHIFT = 8                                 # of the error sums, which rank cells only


def row_maxima(w) -> np.ndarray:
    """Bits (uint32 [n]) of each row's largest magnitude in float32 [n, k]; column shards combine by maximum."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits.max(axis=1, initial=0)


def row_scales(maxima) -> np.ndarray:
    """float16 bits (uint16) of the row scales: row maximum / 127 rounded up, so that no row passes 127 units.

    Raises ValueError where a row holds NaN or infinity, or is too large for float16.
    """
    maxima = np.asarray(maxima, np.uint32)
    check_range(maxima)
    scales = maxima.view(np.float32) / np.float32(LARGEST)
    rounded = scales.astype(np.float16)
    return rounded.view(np.uint16) + (rounded.astype(np.float32) < scales)


def check_range(maxima, what="row") -> None:
    """Raises ValueError unless all magnitudes (float32 bits) are finite and at most 127 x 65,504."""
    if not maxima.size:
        return
    worst = np.argmax(maxima)
    largest, where = maxima.flat[worst], f"{what} {worst}"
    if largest >= INFINITY_BITS:
        raise ValueError(f"{where} of the weights holds NaN or infinity")
    if largest.view(np.float32) > LARGEST * 65504:
        raise ValueError(f"{where} of the weights reaches {largest.view(np.float32):.3g}; "
                         f"scales are float16, so {LARGEST * 65504} is the largest")


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
    check_range(maxima.max(axis=1, initial=0))
    scales = (maxima.view(np.float32) / np.float32(LARGEST)).astype(np.float16)
    factors = scales.astype(np.float32)[:, :, None]
    values = np.divide(v, factors, out=np.zeros_like(v), where=factors > 0)
    codes = np.clip(np.rint(values), -LARGEST, LARGEST).astype(np.int8)
    return Packed("q8", len(v), blocks, codes, scales.view(np.uint16))


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
