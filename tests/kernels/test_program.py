"""Programs: operations in order, what they found, and what they keep."""

import gc
import threading
import time

import numpy as np
import pytest
from numba import carray
from numba.extending import intrinsic

from llama_hpc.kernels.cpu.memory import atomic_add, atomic_load, atomic_or, int64_at, record, record_pointer
from llama_hpc.kernels.cpu.operation import operation
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.team import begin, chunk, work_at
from llama_hpc.kernels.cpu.waiting import nap
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool

STEP = record("team", "status", "work", "values", "factor", "found")


@intrinsic
def _step_at(typing_context, where):
    return record_pointer(STEP)


@operation
def step_operation(member, where):
    """values [100] = values * factor + 1; the status takes ``found``."""
    op = carray(_step_at(where), 1)[0]
    work, values = carray(work_at(op.work), 1)[0], int64_at(op.values)
    begin(op.team, member, work, 100)
    first, last = chunk(op.team, member, work, 100)
    while last > first:
        for i in range(first, last):
            values[i] = values[i] * op.factor + 1
            if op.found:
                atomic_or(op.status, op.found)
        first, last = chunk(op.team, member, work, 100)


@operation
def count_operation(member, where):
    """Counts the members that come by."""
    op = carray(_step_at(where), 1)[0]
    atomic_add(op.values, 1)


@operation
def held_operation(member, where):
    """Says that a member has come, and returns when the third of the values is set."""
    op = carray(_step_at(where), 1)[0]
    atomic_add(op.values + 8, 1)
    while atomic_load(op.values + 16) == 0:
        nap(1000)


@pytest.fixture(params=[1, 2, 3])
def pool(request):
    pool = Pool(request.param)
    yield pool
    pool.close()


def _add(program, values, factor, found=0):
    program.add(factor, step_operation, STEP, ONE_TASK.record(program.pool.threads), values=values, factor=factor, found=found)


def test_operations_run_one_after_the_other(pool):
    program, values = Program(pool), np.arange(100)
    for factor in (2, 3, 1, 5):
        _add(program, values, factor)
    assert program.run() == -1 and program.names == [2, 3, 1, 5]
    np.testing.assert_array_equal(values, ((np.arange(100) * 2 + 1) * 3 + 2) * 5 + 1)


def test_status_names_the_first_operation_that_found_something(pool):
    program, values = Program(pool), np.zeros(100, np.int64)
    for found in (0, 0, 6, 0, 1):
        _add(program, values, 1, found)
    assert program.run() == 2 and program.status.tolist() == [0, 0, 6, 0, 1]
    program.clear()
    assert not program.status.any()


def test_something_may_run_between_operations(pool):
    program, values, seen = Program(pool), np.zeros(100, np.int64), []
    for factor, found in ((1, 0), (2, 6), (3, 1)):
        _add(program, values, factor, found)
    assert program.run(lambda: seen.append(set(values))) == 1 and program.status.tolist() == [0, 6, 1]
    assert seen == [{1}, {3}, {10}]


def test_a_program_may_grow(pool):
    program, values = Program(pool), np.zeros(100, np.int64)
    _add(program, values, 1)
    program.run()
    _add(program, values, 10)
    program.run()
    assert set(values) == {21}


def test_an_empty_program_loses_no_worker(pool):
    """Every member runs every operation, whatever ran before."""
    empty, program, seen = Program(pool), Program(pool), np.zeros(1, np.int64)
    program.add("count", count_operation, STEP, ONE_TASK.record(pool.threads), values=seen)
    for times in range(1, 200):
        assert empty.run() == -1 and program.run() == -1
        assert seen[0] == times * pool.threads


def test_arrays_are_kept(pool):
    program, kept = Program(pool), []
    for factor in range(20):
        values = np.full(100, factor)
        kept.append(values.ctypes.data)
        _add(program, values, 1)
        del values
    gc.collect()
    others = [np.full(100, -1) for _ in range(20)]
    program.run()
    assert all((other == -1).all() for other in others) and not {other.ctypes.data for other in others} & set(kept)


def test_where_a_thread_is_can_be_seen_while_a_program_runs(pool):
    """By a thread that does not wait for it: in the operation that does not end, or at last in the last one."""
    program, gate = Program(pool), np.zeros(8, np.int64)
    for name, function in (("before", count_operation), ("held", held_operation), ("behind", count_operation)):
        program.add(name, function, STEP, ONE_TASK.record(pool.threads), values=gate, factor=0, found=0)
    other = Program(pool)
    _add(other, np.arange(100), 1)
    runner = threading.Thread(target=program.run)
    runner.start()
    try:
        end = time.monotonic() + 20
        while gate[1] < pool.threads and time.monotonic() < end:
            time.sleep(0.001)
        places = pool.reached()
        assert [program.find(place) for place in places] == [1] * pool.threads
        assert program.kinds[1] == "held" and [other.find(place) for place in places] == [None] * pool.threads
    finally:
        gate[2] = 1
        runner.join()
    assert program.find(pool.reached()[0]) == 2
