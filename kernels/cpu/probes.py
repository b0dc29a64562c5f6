"""What this machine can do at best: reading memory, and the arithmetic of registers alone. For benchmarks."""

import numpy as np
from numba import njit, prange

from . import simd
from . import simd_int8 as int8
from .target import kernels

CHAINS = 16                     # independent accumulators, enough to hide the latency of one instruction


@njit(cache=True)
def _sum(words):
    total = np.int64(0)
    for i in range(words.shape[0]):
        total += words[i]
    return total


@njit(cache=True, parallel=True)
def read_memory(words, threads):
    """The sum of an int64 array, so that every byte is read once, by ``threads`` threads."""
    total, count = 0, words.shape[0]
    for part in prange(threads):
        total += _sum(words[count * part // threads : count * (part + 1) // threads])
    return total


@njit(cache=True, parallel=True)
def _dots(x, steps, threads, out):
    for part in prange(threads):
        weights, chain = int8.load_bytes(x, 0), simd.tile_zeros(CHAINS)
        counts = int8.counts_start(chain, out, part, 0)
        for _ in range(steps):
            counts = int8.dot(counts, weights, x, 0, 0)
        chain = int8.tile_fma_counts(chain, counts, 0, simd.splat(np.float32(1)), x.view(np.float32), 0, 0)
        simd.store(out.view(np.float32), 16 * part, simd.tile_sum(chain))


@njit(cache=True, parallel=True)
def _fmas(x, steps, threads, out):
    for part in prange(threads):
        weights, chain = simd.load(x, 0), simd.tile_zeros(CHAINS)
        for _ in range(steps):
            chain = simd.tile_fma(chain, weights, x, 0, 0)
        simd.store(out, 16 * part, simd.tile_sum(chain))


def arithmetic(steps: int, threads: int) -> int:
    """Runs the products' inner instruction in registers; returns the operations done (a multiply-add counts as two)."""
    if kernels() == "float":
        _fmas(np.ones(16, np.float32), steps, threads, np.zeros(16 * threads, np.float32))
        return 2 * 16 * CHAINS * steps * threads
    _dots(np.ones(64, np.int8), steps, threads, np.zeros(16 * threads, np.int32))
    return 2 * 64 * CHAINS * steps * threads
