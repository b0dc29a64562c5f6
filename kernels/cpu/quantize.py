"""Quantising weights on the CPU: same names and bits as the plain form in ``reference_quantize``, and ``threads``.

All but the scaling of a weight is integer arithmetic, so neither the vector width nor the number of threads can change
a bit. Rows, and chunks of a sample, are independent: a serial and a parallel loop call the same function for each.
"""

from functools import lru_cache

import numpy as np
from numba import config, get_num_threads, set_num_threads

from ..formats import CODE_BYTES, CODEBOOK_SIZE, Blocks, Packed, pack_int4
from ..numerics import GROUP
from ..reference_quantize import (
    INT4_LEVELS,
    INVERSES,
    LARGEST,
    SQUARES,
    check_range,
    int4_factors,
    inverse_scales,
    row_scales,
)
from . import quantize_loops as loops


def row_maxima(w, threads: int = 1) -> np.ndarray:
    """Bits (uint32 [n]) of each row's largest magnitude in float32 [n, k]; column shards combine by maximum."""
    w = np.ascontiguousarray(w, np.float32)
    maxima = np.zeros(w.shape[0], np.uint32)
    _run(loops.maxima_serial, loops.maxima_parallel, threads, w.view(np.uint32), maxima)
    return maxima


def quantize_q3_5(w, blocks: Blocks, codebook, maxima, threads: int = 1) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    ``codebook``: int8 [128, 2] with (0, 0) as entry 0, of the whole tensor. ``maxima``: ``row_maxima`` of whole rows.
    Raises ValueError for weights that are not finite or too large for float16 scales.
    """
    w = _rows(w, blocks)
    scales = row_scales(maxima)
    if scales.shape != (len(w),):
        raise ValueError(f"{len(w)} rows of weights need as many row maxima, not {scales.shape}")
    factors = np.zeros((len(w), blocks.groups), np.uint8)
    codes = np.zeros((len(w), blocks.groups, CODE_BYTES), np.uint8)
    _run(loops.pairs_serial, loops.pairs_parallel, threads, w, inverse_scales(scales), blocks.block, blocks.groups_per_block,
         *_tables(codebook.tobytes()), INVERSES, SQUARES, factors, codes)
    return Packed("q3_5", len(w), blocks, codes, factors, scales, codebook)


def quantize_q8(w, blocks: Blocks, threads: int = 1) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    A group's factor is float16(maximum / 127), its values rint(w / factor) within ±127, zeros where the factor is 0.
    Raises ValueError for weights that are not finite or too large for float16 factors.
    """
    w = _rows(w, blocks)
    maxima = np.zeros((len(w), blocks.groups), np.uint32)
    _run(loops.group_maxima_serial, loops.group_maxima_parallel, threads, w.view(np.uint32), blocks.block,
         blocks.groups_per_block, maxima)
    check_range(maxima.max(axis=1, initial=0), "q8")
    scales = (maxima.view(np.float32) / np.float32(LARGEST)).astype(np.float16)
    codes = np.zeros((len(w), blocks.groups, GROUP), np.int8)
    _run(loops.integers_serial, loops.integers_parallel, threads, w, blocks.block, blocks.groups_per_block,
         scales.astype(np.float32), -LARGEST, LARGEST, codes)
    return Packed("q8", len(w), blocks, codes, scales.view(np.uint16))


def quantize_q4(w, blocks: Blocks, threads: int = 1) -> Packed:
    """Quantises float32 [n, blocks.size], any shard of rows and of columns cut at reduction blocks.

    A group's factor is that of least error among a few (see ``reference_quantize``) rounded to float16, its values are
    rint(w / factor) within -8 … 7, zeros where the factor is 0. Raises ValueError for weights that are not finite or
    too large for float16 factors.
    """
    w = _rows(w, blocks)
    check_range(row_maxima(w, threads), "q4")
    factors = np.zeros((len(w), blocks.groups), np.float32)
    _run(loops.int4_factors_serial, loops.int4_factors_parallel, threads, w, blocks.block, blocks.groups_per_block,
         INT4_LEVELS, factors)
    scales = int4_factors(factors)
    codes = np.zeros((len(w), blocks.groups, GROUP), np.int8)
    _run(loops.integers_serial, loops.integers_parallel, threads, w, blocks.block, blocks.groups_per_block,
         scales.view(np.float16).astype(np.float32), -8, 7, codes)
    return Packed("q4", len(w), blocks, pack_int4(codes), scales)


def quantize_f16(w, threads: int = 1) -> np.ndarray:
    """float16 bits (uint16 [n, k]) of float32 weights, rounded half to even. Raises ValueError for what does not fit."""
    check_range(row_maxima(w, threads), "f16")
    return np.asarray(w, np.float32).astype(np.float16).view(np.uint16)


def cell_sums(v, weights, codebook, threads: int = 1) -> np.ndarray:
    """int64 [128, 4] sums over the pairs that choose each codebook entry; see ``reference_quantize.cell_sums``."""
    parts = np.zeros((-(-len(v) // loops.CHUNK), CODEBOOK_SIZE, 4), np.int64)
    # One memory layout of the arguments, so that Numba compiles once.
    v, weights = np.ascontiguousarray(v), np.ascontiguousarray(weights)
    _run(loops.sums_serial, loops.sums_parallel, threads, v, weights, *_tables(codebook.tobytes()), INVERSES, SQUARES,
         parts)
    return parts.sum(axis=0)


def _rows(w, blocks: Blocks) -> np.ndarray:
    w = np.ascontiguousarray(w, np.float32)
    if w.ndim != 2 or w.shape[1] != blocks.size:
        raise ValueError(f"weights of shape {w.shape} must be [n, {blocks.size}]")
    return w


def _run(serial, parallel, threads: int, *arrays) -> None:
    if threads == 1:
        return serial(*arrays)
    before = get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    try:
        parallel(*arrays)
    finally:
        set_num_threads(before)


# A tensor comes in chunks of rows, and every fit begins with the same few codebooks and makes less than ten of its own.
@lru_cache(maxsize=16)
def _tables(codebook: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The entry nearest to each point of the plane, as an index (uint8) and as a pair of int8 (in the bits of uint16)."""
    pairs = np.frombuffer(codebook, np.int8).reshape(CODEBOOK_SIZE, 2)
    nearest = np.empty(loops.SIDE * loops.SIDE, np.uint8)
    loops.fill_nearest(pairs.astype(np.int32), nearest)
    return nearest, pairs.view("<u2")[:, 0].astype(np.uint16)[nearest]
