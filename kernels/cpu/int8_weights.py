"""Weights in memory for the int8 products: bytes offset by 128, or the 7-bit codes of ``q3_5``, 16 rows interleaved."""

from dataclasses import dataclass

import numpy as np
from numba import njit

from ..formats import CODE_BITS, CODEBOOK_SIZE, PAIRS, Packed, unpack_codes
from ..numerics import GROUP
from .matmul_int8 import BYTES, CODES, GROUP_CODES, LANES, PAIR_ORDER, STEPS

_ORDER = np.array(PAIR_ORDER)


@dataclass(frozen=True)
class ByteWeights:
    """``values`` int8 [tiles, groups * 8, 64], bit patterns of value + 128: 16 rows x 4 k; ``factors`` [tiles, groups, 16],
    float32 or float16 bits (uint16); ``row_scales`` float32 [tiles * 16]."""

    values: np.ndarray
    factors: np.ndarray
    row_scales: np.ndarray
    rows: int
    groups: int
    groups_per_block: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.factors.nbytes + self.row_scales.nbytes

    def fill(self, first_row: int, packed: Packed) -> None:
        """Stores rows first_row …"""
        values, factors, row_scales = packed.unpack()
        _place_bytes(values, self.values, first_row)
        if self.factors.dtype == np.uint16:
            factors = packed.scales
        _place_factors(np.ascontiguousarray(factors), self.factors, first_row)
        self.row_scales[first_row : first_row + packed.n] = row_scales


@dataclass(frozen=True)
class PairWeights:
    """``codes`` int8 [tiles, groups, 224]: four times 64 codes of 7 bits, 16 rows x 4 pairs; ``indices`` int8 [tiles, groups, 8]:
    4-bit factor indices of 16 rows; ``table`` int8 [256]: first, then second values of the 128 pairs, offset by 128."""

    codes: np.ndarray
    indices: np.ndarray
    table: np.ndarray
    row_scales: np.ndarray
    rows: int
    groups: int
    groups_per_block: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.indices.nbytes + self.table.nbytes + self.row_scales.nbytes

    def fill(self, first_row: int, packed: Packed) -> None:
        """Stores rows first_row …"""
        _place_codes(unpack_codes(packed.codes), self.codes, first_row)
        _place_indices(packed.scales, self.indices, first_row)
        self.row_scales[first_row : first_row + packed.n] = packed.row_scales.view(np.float16)


def empty_byte_weights(rows: int, groups: int, groups_per_block: int, factor_dtype) -> ByteWeights:
    """Room for weights of any quantised format."""
    tiles = -(-rows // LANES)
    values = np.full((tiles, groups * STEPS, BYTES), -128, np.int8)
    return ByteWeights(values, np.zeros((tiles, groups, LANES), factor_dtype), np.zeros(tiles * LANES, np.float32), rows, groups,
                       groups_per_block)


def empty_pair_weights(rows: int, groups: int, groups_per_block: int, codebook: np.ndarray) -> PairWeights:
    """Room for ``q3_5`` weights with this codebook, int8 [128, 2]."""
    tiles = -(-rows // LANES)
    # A load takes 64 bytes where a code block has 56: the array goes on for 8 bytes behind its last.
    codes = np.zeros(tiles * groups * GROUP_CODES + BYTES - CODES, np.int8)[: tiles * groups * GROUP_CODES]
    table = (codebook.astype(np.int16) + 128).astype(np.uint8).T.copy().reshape(2 * CODEBOOK_SIZE).view(np.int8)
    return PairWeights(codes.reshape(tiles, groups, GROUP_CODES), np.zeros((tiles, groups, LANES // 2), np.int8), table,
                       np.zeros(tiles * LANES, np.float32), rows, groups, groups_per_block)


@njit(cache=True)
def _place_bytes(values, out, first_row):
    for i in range(values.shape[0]):
        tile, lane = (first_row + i) // LANES, (first_row + i) % LANES
        for group in range(values.shape[1]):
            for k in range(GROUP):
                step, place = group * STEPS + k // 8 * 2 + k % 2, lane * 4 + k % 8 // 2
                out[tile, step, place] = np.int8(np.int32(values[i, group, k]) + 128 - 256 * (values[i, group, k] >= 0))


@njit(cache=True)
def _place_factors(factors, out, first_row):
    for i in range(factors.shape[0]):
        for group in range(factors.shape[1]):
            out[(first_row + i) // LANES, group, (first_row + i) % LANES] = factors[i, group]


@njit(cache=True)
def _place_codes(codes, out, first_row):
    """7-bit fields, little-endian: eight codes (two rows) in seven bytes; a row's field may share bytes with its neighbour's."""
    for i in range(codes.shape[0]):
        tile, lane = (first_row + i) // LANES, (first_row + i) % LANES
        for group in range(codes.shape[1]):
            for pair in range(PAIRS):
                bit = (lane * 4 + pair % 4) * CODE_BITS
                at, shift = pair // 4 * CODES + bit // 8, bit % 8
                field = np.int32(codes[i, group, pair]) << shift
                out[tile, group, at] |= np.int8(field & 255)
                if shift > 1:
                    out[tile, group, at + 1] |= np.int8(field >> 8)


@njit(cache=True)
def _place_indices(indices, out, first_row):
    for i in range(indices.shape[0]):
        tile, lane = (first_row + i) // LANES, (first_row + i) % LANES
        for group in range(indices.shape[1]):
            out[tile, group, lane // 2] |= np.int8(indices[i, group] << (4 * (lane % 2)))
