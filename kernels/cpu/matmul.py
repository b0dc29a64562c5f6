"""Products of activations and weights on the CPU, canonical: y = x Wᵀ as int64 fixed-point sums.

Weights lie in memory with 16 rows interleaved, so that one vector register holds one k of 16 outputs: lanes are
outputs, and no float sum ever runs across lanes. Quantised activations are small integers stored as float32: the dot
product of a group is then exact in float32 (below 2**24), whatever the instruction set.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numba import njit, prange

from ..numerics import BLOCK, BLOCK_LIMIT, FIXED, GROUP, OK, OUT_OF_RANGE
from . import matmul_int8, simd
from .int8_weights import ByteWeights, PairWeights

LANES = simd.LANES


@dataclass(frozen=True)
class FloatWeights:
    """float32 weights of ``rows`` x ``columns``, interleaved [tiles, columns, 16]; ``block`` k form a reduction block."""

    values: np.ndarray
    row_scales: np.ndarray
    rows: int
    columns: int
    block: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.row_scales.nbytes


@dataclass(frozen=True)
class IntegerWeights:
    """Quantised weights: a weight is value x factor x row scale.

    int8 ``values`` [tiles, groups * 32, 16], float32 ``factors`` [tiles, groups, 16] and ``row_scales`` [tiles * 16]. A group
    is 32 k and starts afresh in each reduction block of ``groups_per_block`` groups; gaps hold zeros.
    """

    values: np.ndarray
    factors: np.ndarray
    row_scales: np.ndarray
    rows: int
    groups: int
    groups_per_block: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.factors.nbytes + self.row_scales.nbytes


def tiles(rows: int) -> int:
    """Tiles of 16 rows that hold ``rows`` rows."""
    return -(-rows // LANES)


def empty_float_weights(rows: int, columns: int, block: int) -> FloatWeights:
    """Room for float32 weights, to be filled by ``fill_float``."""
    values = np.zeros((tiles(rows), columns, LANES), np.float32)
    return FloatWeights(values, np.ones(tiles(rows) * LANES, np.float32), rows, columns, block)


def empty_integer_weights(rows: int, groups: int, groups_per_block: int) -> IntegerWeights:
    """Room for quantised weights, to be filled by ``fill_integer``."""
    values = np.zeros((tiles(rows), groups * GROUP, LANES), np.int8)
    factors = np.zeros((tiles(rows), groups, LANES), np.float32)
    return IntegerWeights(values, factors, np.zeros(tiles(rows) * LANES, np.float32), rows, groups, groups_per_block)


def fill_float(weights: FloatWeights, first_row: int, part) -> None:
    """Stores ``part`` float32 [n, columns] as rows first_row … of the weights."""
    _interleave(part, weights.values, first_row)


def fill_integer(weights: IntegerWeights, first_row: int, values, factors, row_scales) -> None:
    """Stores rows first_row …: int8 [n, groups, 32], float32 factors [n, groups] and row scales [n]."""
    rows = values.shape[0]
    _interleave(np.ascontiguousarray(values).reshape(rows, weights.values.shape[1]), weights.values, first_row)
    _interleave(np.ascontiguousarray(factors), weights.factors, first_row)
    weights.row_scales[first_row : first_row + rows] = row_scales


@njit(cache=True)
def _interleave(part, values, first_row):
    for i in range(part.shape[0]):
        row = first_row + i
        for k in range(part.shape[1]):
            values[row // LANES, k, row % LANES] = part[i, k]


def matmul(x, x_scales, weights, sums, rows: int, threads: int = 1, corrections=None) -> int:
    """sums[m, n] = sum over reduction blocks of rint(block value * 2**32), for the first ``rows`` rows of x.

    For ``IntegerWeights`` x is float32 [M, groups * 32] holding whole numbers of -127…127 and x_scales float32
    [M, groups]; for ``ByteWeights`` and ``PairWeights`` x is int8, with ``corrections``, as ``quantize_rows_int8`` leaves
    them; for ``FloatWeights`` x is float32 [M, columns] and x_scales is not used. sums is int64
    [M, tiles * 16] and is overwritten. Returns ``OK``, or ``OUT_OF_RANGE`` when a block value is not finite or not below 2**19.
    """
    if isinstance(weights, FloatWeights):
        run = _float_parallel if threads > 1 else _float_serial
        faults = run(x, weights.values, weights.row_scales, weights.block, sums, rows, threads)
    elif isinstance(weights, PairWeights):
        run = matmul_int8.pairs_parallel if threads > 1 else matmul_int8.pairs_serial
        faults = run(x, x_scales, corrections, weights.codes, weights.indices, weights.table, weights.row_scales,
                     sums, rows, *_decoded(threads), _totals(threads, rows))
    elif isinstance(weights, ByteWeights):
        run = matmul_int8.bytes_parallel if threads > 1 else matmul_int8.bytes_serial
        faults = run(x, x_scales, corrections, weights.values, weights.factors, weights.row_scales, sums, rows,
                     _totals(threads, rows))
    else:
        run = _integer_parallel if threads > 1 else _integer_serial
        faults = run(x, x_scales, weights.values, weights.factors, weights.row_scales, weights.groups_per_block, sums,
                     rows, threads)
    return OUT_OF_RANGE if faults else OK


@cache
def _decoded(threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for one decoded reduction block of two tiles, for each thread: bytes and float factors."""
    groups = 2 * BLOCK // GROUP
    steps = groups * matmul_int8.STEPS * matmul_int8.BYTES
    return np.empty((threads, steps), np.int8), np.empty((threads, groups * LANES), np.float32)


_totals_of_threads: dict[int, np.ndarray] = {}


def _totals(threads: int, rows: int) -> np.ndarray:
    """int64 scratch of at least [threads, rows * 32], kept and grown."""
    totals = _totals_of_threads.get(threads)
    if totals is None or totals.shape[1] < rows * matmul_int8.WIDTH:
        totals = _totals_of_threads[threads] = np.empty((threads, rows * matmul_int8.WIDTH), np.int64)
    return totals


@njit(cache=True)
def _float_tile(zeros, x, values, row_scales, block, sums, tile, token):
    """One tile of 16 rows for the tokens of a register tile; returns whether every block value was in range."""
    columns, width = values.shape[1], sums.shape[1]
    scales = simd.load(row_scales, tile * LANES)
    within = True
    for start in range(0, columns, block):
        chain = simd.tile_clear(zeros)
        for k in range(start, min(start + block, columns)):
            chain = simd.tile_fma(chain, simd.load(values, (tile * columns + k) * LANES), x, token * columns + k, columns)
        within &= simd.tile_add_fixed(chain, scales, sums, token * width + tile * LANES, width, FIXED, BLOCK_LIMIT)
    return within


@njit(cache=True)
def _float_rows(x, values, row_scales, block, sums, rows, first, last):
    """Tiles first … last - 1 for all tokens; returns the number of register tiles with a value out of range."""
    faults = 0
    for tile in range(first, last):
        sums[:rows, tile * LANES : (tile + 1) * LANES] = 0
        token = 0
        while token + 8 <= rows:
            faults += not _float_tile(simd.tile_zeros(8), x, values, row_scales, block, sums, tile, token)
            token += 8
        while token < rows:
            faults += not _float_tile(simd.tile_zeros(1), x, values, row_scales, block, sums, tile, token)
            token += 1
    return faults


@njit(cache=True)
def _float_serial(x, values, row_scales, block, sums, rows, threads):
    return _float_rows(x, values, row_scales, block, sums, rows, 0, values.shape[0])


@njit(cache=True, parallel=True)
def _float_parallel(x, values, row_scales, block, sums, rows, threads):
    count, faults = values.shape[0], 0
    for part in prange(threads):
        faults += _float_rows(x, values, row_scales, block, sums, rows, count * part // threads, count * (part + 1) // threads)
    return faults


@njit(cache=True)
def _integer_tile(zeros, x, x_scales, values, factors, row_scales, groups_per_block, sums, tile, token):
    """As ``_float_tile`` for quantised weights: exact group dots, one float chain over the groups of a block."""
    columns, groups, width = values.shape[1], factors.shape[1], sums.shape[1]
    scales = simd.load(row_scales, tile * LANES)
    within = True
    for start in range(0, groups, groups_per_block):
        chain = simd.tile_clear(zeros)
        for group in range(start, min(start + groups_per_block, groups)):
            dots = simd.tile_clear(zeros)
            for k in range(group * GROUP, (group + 1) * GROUP):
                dots = simd.tile_fma(dots, simd.load(values, (tile * columns + k) * LANES), x, token * columns + k, columns)
            factor = simd.load(factors, (tile * groups + group) * LANES)
            chain = simd.tile_fma_scaled(chain, dots, factor, x_scales, token * groups + group, groups)
        within &= simd.tile_add_fixed(chain, scales, sums, token * width + tile * LANES, width, FIXED, BLOCK_LIMIT)
    return within


@njit(cache=True)
def _integer_rows(x, x_scales, values, factors, row_scales, groups_per_block, sums, rows, first, last):
    faults = 0
    for tile in range(first, last):
        sums[:rows, tile * LANES : (tile + 1) * LANES] = 0
        token = 0
        while token + 8 <= rows:
            faults += not _integer_tile(simd.tile_zeros(8), x, x_scales, values, factors, row_scales, groups_per_block,
                                        sums, tile, token)
            token += 8
        while token < rows:
            faults += not _integer_tile(simd.tile_zeros(1), x, x_scales, values, factors, row_scales, groups_per_block,
                                        sums, tile, token)
            token += 1
    return faults


@njit(cache=True)
def _integer_serial(x, x_scales, values, factors, row_scales, groups_per_block, sums, rows, threads):
    return _integer_rows(x, x_scales, values, factors, row_scales, groups_per_block, sums, rows, 0, values.shape[0])


@njit(cache=True, parallel=True)
def _integer_parallel(x, x_scales, values, factors, row_scales, groups_per_block, sums, rows, threads):
    count, faults = values.shape[0], 0
    for part in prange(threads):
        faults += _integer_rows(x, x_scales, values, factors, row_scales, groups_per_block, sums, rows,
                                count * part // threads, count * (part + 1) // threads)
    return faults
