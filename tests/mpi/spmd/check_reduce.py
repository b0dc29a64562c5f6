"""Exact sums over the ranks: against Python's integers, in any order, and bit by bit for joined floats."""

import numpy as np
import pytest

from llama_hpc.comm.reduce import TensorReducer

LENGTHS = (1, 7, 4096, 200_003)     # libraries choose other algorithms for other lengths


def values_of(rank: int, length: int) -> np.ndarray:
    """int64 of either sign and up to 2**58, known to every rank."""
    raw = np.random.Philox(key=np.array([rank, length], np.uint64)).random_raw(length)
    return raw.view(np.int64) >> 5


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_are_those_of_integers(comm, length):
    reducer, sums = TensorReducer(comm), values_of(comm.rank, length)
    reducer.sum_fixed(sums)
    parts = [values_of(rank, length).tolist() for rank in range(comm.size)]
    assert sums.tolist() == [sum(column) for column in zip(*parts, strict=True)]
    assert reducer.calls == (comm.size > 1)


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
    reducer, values = TensorReducer(comm), np.where(owner == comm.rank, expected, np.uint32(0)).view(np.float32)
    reducer.sum_disjoint(values)
    assert np.array_equal(values.view(np.uint32), expected)
    assert reducer.calls == (comm.size > 1)


def test_maxima_of_unsigned_integers(comm):
    values = np.array([comm.rank, 0x7F800000 - comm.rank, 0xFFFFFFFF if comm.rank == comm.size - 1 else 0], np.uint32)
    TensorReducer(comm).maximum(values)
    assert values.tolist() == [comm.size - 1, 0x7F800000, 0xFFFFFFFF]
