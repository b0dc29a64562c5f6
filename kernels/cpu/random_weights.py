"""Random weights in the layouts of the CPU's kernels, made without quantising anything: bits from a bank, at the speed of memory.

Their size follows from the number of columns, so that a model of them stays within the range of exact sums.
"""

from math import sqrt

import numpy as np

from ..formats import Blocks, Packed
from ..random_rows import CODEBOOK, EIGHT_BITS, FACTOR_SIZE, PAIR_SIZE, RandomRows
from .simd_weights import KINDS
from .weights import Weights, allocate, allocate_pair, fill
from .workers import Pool


class RandomWeights(RandomRows):
    """The same as matrices that CPU kernels multiply; the threads of ``pool``, if given, touch their memory first."""

    def __init__(self, pool: Pool | None = None):
        super().__init__()
        self._pool = pool

    def matrix(self, weights_format: str, rows: int, blocks: Blocks) -> Weights:
        """Kernel weights [rows, blocks.size]."""
        return self._drawn(weights_format, allocate(weights_format, rows, blocks, _codebook(weights_format), self._pool))

    def pair(self, weights_format: str, rows: int, blocks: Blocks) -> list[Weights]:
        """The same for gate and up."""
        both = allocate_pair(weights_format, rows, blocks, [_codebook(weights_format)] * 2, self._pool)
        return [self._drawn(weights_format, each) for each in both]

    def _drawn(self, weights_format: str, weights: Weights) -> Weights:
        if not weights.data.size:
            return weights
        size = 1 / sqrt(max(1, weights.blocks.size))
        if not weights.quantized:
            _repeat(self._plain(weights_format, size), weights.data)
            return weights
        _repeat(self._bytes, weights.data.view(np.uint8))
        if KINDS[weights.layout].indexed:
            weights.row_scales[:] = size / (FACTOR_SIZE * (PAIR_SIZE if weights.layout == "codes" else EIGHT_BITS))
            return weights
        # A line of factors, then the codes of the pair of groups behind it.
        lines = weights.data.view(np.float16).reshape(len(weights.data), 2, -1, 1 + KINDS[weights.layout].vectors, 32)[..., 0, :]
        lines[:] = np.resize(self._factors(weights_format, size, lines.size // max(1, len(lines))), lines.shape[1:])
        weights.row_scales[:] = 1
        return weights


def _codebook(weights_format: str) -> np.ndarray | None:
    return CODEBOOK if weights_format == "q3_5" else None


def filled(weights_format: str, plain: Packed | np.ndarray, blocks: Blocks) -> Weights:
    """Kernel weights of rows as ``RandomWeights.rows`` gives them, or of a part of them."""
    rows = len(plain) if isinstance(plain, np.ndarray) else plain.n
    weights = allocate(weights_format, rows, blocks, _codebook(weights_format))
    fill(weights, 0, plain)
    return weights


def copied(weights: Weights, weights_format: str) -> Weights:
    """The same weights elsewhere in memory."""
    found = allocate(weights_format, weights.rows, weights.blocks, _codebook(weights_format))
    found.data[...], found.row_scales[...] = weights.data, weights.row_scales
    return found


def _repeat(bank: np.ndarray, target: np.ndarray) -> None:
    """Fills an array whose panels are contiguous with copies of parts of the bank."""
    size, first = target[:1].size, 0
    for panel in target:
        first = first if first + size <= bank.size else 0
        panel[...] = np.resize(bank[first : first + size], panel.shape)
        first += size
