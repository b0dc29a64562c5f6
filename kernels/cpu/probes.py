"""What this machine can do at best: reading memory, and the arithmetic of registers alone. For benchmarks.

Both are operations of a program, so that they run on the very threads of the products that they are compared with.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from . import simd
from . import simd_int8 as int8
from . import simd_weights as coded
from .memory import aligned, float32_at, int8_at, int32_at, int64_at, record, record_pointer
from .operation import operation
from .program import Program
from .team import THREADS
from .workers import ONE_TASK, Pool

PROBE = record("team", "status", "work", "data", "count", "out")
CHAINS = 8                      # independent accumulators, enough to hide the latency of one instruction on two pipes


@intrinsic
def _probe_at(typing_context, where):
    return record_pointer(PROBE)


@njit(cache=True)
def _sum(words, count):
    total = np.int64(0)
    for i in range(count):
        total += words[i]
    return total


@operation
def read_operation(member, where):
    """Reads ``count`` int64 once, a range for each member."""
    op = carray(_probe_at(where), 1)[0]
    threads = int64_at(op.team)[THREADS]
    first, last = op.count * member // threads, op.count * (member + 1) // threads
    int64_at(op.out)[8 * member] = _sum(carray(int64_at(op.data + 8 * first), last - first), last - first)


@operation
def dots_operation(member, where):
    """``count`` times 64 dot products of 64 int8 in registers, on every member."""
    op = carray(_probe_at(where), 1)[0]
    kind, chain, x, data = coded.kind("bytes"), simd.tile_zeros(CHAINS, 1), int8_at(op.data), int8_at(op.data)
    raw, table = coded.load_raw(kind, chain, data, 0, 0, 0), coded.load_table(kind, data)
    counts = int8.counts_start(kind, chain, int32_at(op.out), 16 * member, 0)
    for _ in range(op.count):
        counts = int8.dots(kind, counts, raw, 0, 0, table, x, 0, 0)
    ones = simd.splat(np.float32(1))
    chain = int8.tile_fma_counts(chain, counts, ones, ones, float32_at(op.data), 0, 0)
    simd.store(float32_at(op.out), 16 * member, simd.tile_sum(chain))


@operation
def fmas_operation(member, where):
    """``count`` times 8 multiply-adds of 16 float32 in registers, on every member."""
    op = carray(_probe_at(where), 1)[0]
    x = float32_at(op.data)
    weights, chain = simd.load(x, 0), simd.tile_zeros(CHAINS, 1)
    for _ in range(op.count):
        chain = simd.tile_fma(chain, weights, x, 0, 0)
    simd.store(float32_at(op.out), 16 * member, simd.tile_sum(chain))


def _probe(pool: Pool, function, data: np.ndarray, count: int) -> Program:
    program = Program(pool)
    program.add("probe", function, PROBE, ONE_TASK.record(pool.threads), data=data, count=count,
                out=np.zeros(16 * pool.threads, np.int64))
    program.run()
    return program


def read_memory(pool: Pool, words: np.ndarray) -> Program:
    """A program that reads an int64 array once."""
    return _probe(pool, read_operation, words, words.size)


def arithmetic(pool: Pool, steps: int, quantized: bool = True) -> tuple[Program, int]:
    """A program of the products' inner instruction in registers, and its operations (a multiply-add counts as two)."""
    if quantized:
        return _probe(pool, dots_operation, aligned(4096, np.int8, 1), steps), 2 * 64 * int8.STEPS * CHAINS * steps * pool.threads
    return _probe(pool, fmas_operation, aligned(64, np.float32, 1), steps), 2 * 16 * CHAINS * steps * pool.threads
