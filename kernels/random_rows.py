"""Random weights as a loader would read them, made without quantising anything: bits from a bank. Needs no Numba.

Their size follows from the number of columns, so that a model of them stays within the range of exact sums.
"""

from math import sqrt

import numpy as np

from .codebook import start_codebook
from .formats import FACTORS, Blocks, Packed

BANK = 1 << 22                  # bytes, or numbers, that are drawn; larger matrices repeat them
CODEBOOK = start_codebook(110)
EIGHT_BITS, FOUR_BITS = 73.9, 4.64              # root mean squares of uniform int8 and int4
FACTOR_SIZE = float(np.sqrt((FACTORS.astype(np.float64) ** 2).mean()))
PAIR_SIZE = float(np.sqrt((CODEBOOK.astype(np.float64) ** 2).mean()))


class RandomRows:
    """Matrices whose weights have a standard deviation of about 1 / sqrt(columns)."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self._bytes = rng.integers(0, 256, BANK, np.uint8)
        self._normal = rng.standard_normal(BANK, np.float32)

    def rows(self, weights_format: str, rows: int, blocks: Blocks) -> Packed | np.ndarray:
        """The same kind of weights as a loader gives them to ``fill``: packed, float32, or float16 as uint16."""
        size = 1 / sqrt(max(1, blocks.size))
        if weights_format in ("f16", "f32"):
            return np.resize(self._plain(weights_format, size), (rows, blocks.size))
        shape, draw = (rows, blocks.groups), self._bytes
        if weights_format == "q3_5":
            scale = np.full(rows, size / (FACTOR_SIZE * PAIR_SIZE), np.float16).view(np.uint16)
            return Packed("q3_5", rows, blocks, np.resize(draw, (*shape, 14)), np.resize(draw[7:] & 15, shape), scale, CODEBOOK)
        factors = np.resize(self._factors(weights_format, size, 4096), shape).view(np.uint16)
        if weights_format == "q4":
            return Packed("q4", rows, blocks, np.resize(draw, (*shape, 16)), factors)
        # The value -128 does not exist in q8.
        return Packed("q8", rows, blocks, np.maximum(np.resize(draw.view(np.int8), (*shape, 32)), -127), factors)

    def _plain(self, weights_format: str, size: float) -> np.ndarray:
        values = self._normal * np.float32(size)
        return values if weights_format == "f32" else values.astype(np.float16).view(np.uint16)

    def _factors(self, weights_format: str, size: float, count: int) -> np.ndarray:
        """float16 group factors of either sign."""
        spread = FOUR_BITS if weights_format == "q4" else EIGHT_BITS
        return np.where(np.resize(self._bytes, count) & 1, size / spread, -size / spread).astype(np.float16)
