"""Exact joins over the ranks: against Python's integers, in any order, and bit by bit for joined floats."""

import time

import numpy as np
import pytest
from models import reducer_of

from llama_hpc.comm.exchange import PIECE
from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.joining import BITS, FINISH, MAXIMUM, SUM
from llama_hpc.model.faults import Faults
from llama_hpc.model.steps import Steps

MODES = ("mpi", "shared", "combined", "one-sided")

LENGTHS = (1, 7, 4096, 200_003)     # libraries choose other algorithms for other lengths


def values_of(rank: int, length: int) -> np.ndarray:
    """int64 of either sign and up to 2**58, known to every rank."""
    raw = np.random.Philox(key=np.array([rank, length], np.uint64)).random_raw(length)
    return raw.view(np.int64) >> 5


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_are_those_of_integers(comm, length):
    sums = values_of(comm.rank, length)
    TensorReducer(comm).sum_fixed(sums)
    parts = [values_of(rank, length).tolist() for rank in range(comm.size)]
    assert sums.tolist() == [sum(column) for column in zip(*parts, strict=True)]


def test_the_order_of_ranks_does_not_matter(comm):
    sums, reverse = values_of(comm.rank, 4096), values_of(comm.rank, 4096)
    TensorReducer(comm).sum_fixed(sums)
    TensorReducer(comm.Split(0, -comm.rank)).sum_fixed(reverse)
    assert np.array_equal(sums, reverse)


def test_rows_of_a_larger_buffer_are_summed_alone(comm):
    buffer = np.full((4, 16), comm.rank, np.int64)
    TensorReducer(comm).sum_fixed(buffer[:2])
    assert (buffer[:2] == sum(range(comm.size))).all() and (buffer[2:] == comm.rank).all()


def test_joined_floats_keep_their_bits(comm):
    patterns = np.array([0x80000000, 0x00000001, 0x807FFFFF, 0x7FC00000, 0x7FA12345, 0xFFFFFFFF, 0x7F800000, 0xFF800000,
                         0x3F800000, 0x7F7FFFFF, 0x00000000], np.uint32)  # fmt: skip
    expected = np.tile(patterns, comm.size * 13)
    owner = np.arange(expected.size) // 3 % comm.size
    values = np.where(owner == comm.rank, expected, np.uint32(0)).view(np.float32)
    TensorReducer(comm).sum_disjoint(values)
    assert np.array_equal(values.view(np.uint32), expected)


def test_maxima_of_unsigned_integers(comm):
    values = np.array([comm.rank, 0x7F800000 - comm.rank, 0xFFFFFFFF if comm.rank == comm.size - 1 else 0], np.uint32)
    TensorReducer(comm).maximum(values)
    assert values.tolist() == [comm.size - 1, 0x7F800000, 0xFFFFFFFF]


def joined(kind, parts, before):
    """What the parts of all ranks make, by NumPy's integers."""
    if kind == MAXIMUM:
        return np.max(parts, axis=0)
    if kind == BITS:
        return np.sum([part.view(np.int32) for part in parts], axis=0, dtype=np.int32).view(np.float32)
    total = np.sum(parts, axis=0)
    return total if kind == SUM else before + (total * 2.0**-32).astype(np.float32)


def part_of(kind, rank, size, turn, shape):
    """What a rank gives in a turn: known to every rank."""
    rng = np.random.default_rng((kind, rank, turn))
    if kind == BITS:
        values = rng.standard_normal(shape, np.float32)
        values[np.arange(shape[0]) % size != rank] = 0
        return values
    return rng.integers(-2**50, 2**50, shape)


@pytest.mark.parametrize("kind", [SUM, MAXIMUM, BITS])
def test_two_exchanges_under_way_at_once(comm, kind):
    """In pieces and a rest, now few rows and now many; those behind them stay as they are."""
    if comm.size == 1:
        return
    shape = (9, PIECE // 8 // 3 + 7)
    arrays = [np.zeros(shape, np.float32 if kind == BITS else np.int64) for _ in range(2)]
    exchanges = [TensorReducer(comm).exchange(array, kind) for array in arrays]
    for turn, rows in enumerate((9, 1, 3, 4, 9, 2)):
        for i, (array, exchange) in enumerate(zip(arrays, exchanges, strict=True)):
            array[:] = part_of(kind, comm.rank, comm.size, 2 * turn + i, shape)
            exchange.start(rows)
            time.sleep(0.002 * ((comm.rank + turn) % 2))
            exchanges[0].test()
        for i, (array, exchange) in enumerate(zip(arrays, exchanges, strict=True)):
            exchange.wait()
            parts = [part_of(kind, r, comm.size, 2 * turn + i, shape) for r in range(comm.size)]
            assert np.array_equal(array[:rows], joined(kind, parts, None)[:rows]), (turn, i)
            assert np.array_equal(array[rows:], parts[comm.rank][rows:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_joins_inside_of_a_step(comm, mode, threads):
    """Every kind of join in one step, over and over, where now this rank is late and now that one."""
    reducer = reducer_of(comm, mode)
    if comm.size == 1:
        return
    rows, columns, rounds = 5, 1100, 12
    steps = Steps(shared_pool(threads), reducer, Faults())
    regions, targets = {}, {}
    for kind in (SUM, MAXIMUM, BITS, FINISH):
        dtype = np.float32 if kind == BITS else np.int64
        regions[kind] = reducer.region(np.zeros((rows, columns), dtype))
        targets[kind] = np.zeros((rows, columns), np.float32 if kind in (BITS, FINISH) else np.int64)
        steps.join(regions[kind], kind, steps.rows, targets[kind])
    # Behind it everybody has read the last region, which is about to be written again.
    steps.join(reducer.region(np.zeros((rows, columns), np.int64)), SUM, steps.outputs, np.zeros((rows, columns), np.int64))
    for turn in range(rounds):
        count = 1 + turn % rows
        before = targets[FINISH].copy()
        for kind, region in regions.items():
            region.own[:count] = part_of(kind, comm.rank, comm.size, turn, (rows, columns))[:count]
        time.sleep(0.003 * ((comm.rank + turn) % 3))
        steps.rows[:] = count
        steps.run()
        for kind, target in targets.items():
            expected = joined(kind, [part_of(kind, r, comm.size, turn, (rows, columns)) for r in range(comm.size)], before)
            assert np.array_equal(target[:count], expected[:count]), (turn, kind)
    assert reducer.calls == 5 * rounds and reducer.nanoseconds[0] > 0
    sizes = [8 * columns, 8 * columns, 4 * columns, 8 * columns]
    assert reducer.bytes == sum(sizes) * sum(1 + turn % rows for turn in range(rounds))
    comm.Barrier()
    reducer.free()
