"""The codebook of a ``q3_5`` tensor: 128 pairs of int8, fitted to a sample that the tensor's shape alone fixes.

Lloyd's algorithm (S. P. Lloyd, Least squares quantization in PCM, 1982) with the choice of group factors inside: each
step assigns the sample's pairs to entries and moves every entry to the weighted mean of its pairs, in integers. All
ranks that fit the same sample get the same codebook, whatever the threads and the instruction set.
"""

import math

import numpy as np

from .formats import CODEBOOK_SIZE, Blocks
from .numerics import GROUP
from .reference_quantize import LARGEST, UNIT_BITS, inverse_scales, row_maxima, row_scales

SAMPLE_ROWS = 64                # at least, where the tensor has as many
SAMPLE_GROUPS = 4096            # at most, in a fit
RADII = (60, 80, 100, 120)      # of the codebooks to start from: small ones leave more room for outliers
STEPS = 8
WEIGHT_BITS = 20
COS_GOLDEN, SIN_GOLDEN = -0.7373688780783197, 0.6754902942615238


def spread(n: int, count: int) -> np.ndarray:
    """``count`` of the numbers below n, ascending: one from each of ``count`` equal parts, without a period."""
    if count >= n:
        return np.arange(n)
    part = np.arange(count)
    first, end = part * n // count, (part + 1) * n // count
    return first + (part * 2654435769 % 2**32 * (end - first) >> 32)


def sample_rows(n: int, k: int) -> np.ndarray:
    """Indices, ascending, of the rows of an [n, k] tensor that its codebook is fitted to: fixed by the shape alone."""
    return spread(n, max(SAMPLE_ROWS, -(-SAMPLE_GROUPS * GROUP // k)))


def start_codebook(radius: int) -> np.ndarray:
    """int8 [128, 2]: a sunflower spiral, denser towards the middle as weights are, with (0, 0) as entry 0."""
    entries, direction = [], (1.0, 0.0)
    for i in range(CODEBOOK_SIZE):
        t = i / (CODEBOOK_SIZE - 1)
        r = radius * math.sqrt(t) * (0.6 + 0.4 * t)
        x, y = direction
        entries.append((round(r * x), round(r * y)))
        direction = x * COS_GOLDEN - y * SIN_GOLDEN, x * SIN_GOLDEN + y * COS_GOLDEN
    return np.array(entries, np.int8)


def fit_codebook(sample, blocks: Blocks, threads: int = 1, cell_sums=None) -> np.ndarray:
    """int8 [128, 2] with (0, 0) as entry 0, fitted to whole rows ``sample``, float32 [rows, blocks.size].

    ``cell_sums`` is the backend's (that of ``cpu.quantize`` by default). Raises ValueError as ``row_scales`` does.
    """
    if cell_sums is None:
        from .cpu.quantize import cell_sums
    scales = row_scales(row_maxima(sample))
    v = blocks.pad(sample) * inverse_scales(scales)[:, None, None]
    picked = spread(v.shape[0] * v.shape[1], SAMPLE_GROUPS)
    v = np.ascontiguousarray(v.reshape(-1, GROUP)[picked])
    weights = _row_weights(scales)[picked // blocks.groups]
    # A step moves entries but hardly the codebook's size, so the best size is chosen first, on a part of the sample.
    starts = [start_codebook(radius) for radius in RADII]
    errors = [cell_sums(v[::4], weights[::4], start, threads)[:, 3].sum() for start in starts]
    codebook = starts[int(np.argmin(errors))]
    for _ in range(STEPS):
        moved = _move(codebook, cell_sums(v, weights, codebook, threads))
        if np.array_equal(moved, codebook):
            break
        codebook = moved
    return codebook


def _row_weights(scales) -> np.ndarray:
    """int64 squares of the row scales (float16 bits), 2**20 for the largest: errors count as they do in the weights."""
    scales = scales.view(np.float16).astype(np.float64)
    relative = scales / max(scales.max(), 2.0**-24)
    return np.rint(relative * relative * 2.0**WEIGHT_BITS).astype(np.int64)


def _move(codebook, sums) -> np.ndarray:
    """One Lloyd step. Entry 0 stays (0, 0); entries that nobody chose are set beside those with the largest errors."""
    weight, error = sums[:, 0], sums[:, 3]
    mean = np.rint(sums[:, 1:3] / (np.maximum(weight, 1) << UNIT_BITS)[:, None])
    moved = np.where(weight[:, None] > 0, np.clip(mean, -LARGEST, LARGEST), codebook).astype(np.int8)
    moved[0] = 0
    unused = 1 + np.flatnonzero(weight[1:] == 0)
    worst = np.argsort(-error, kind="stable")[:len(unused)]
    for entry, crowded in zip(unused, worst, strict=True):
        if error[crowded] > 0:
            moved[entry] = np.clip(moved[crowded] + np.array([1, 1]), -LARGEST, LARGEST)
    return moved
