"""Shared counters: every number is handed out once, whoever asks and whatever the first rank does meanwhile."""

import time
from contextlib import contextmanager
from itertools import chain

from llama_hpc.comm.counter import SharedCounters


@contextmanager
def counters_of(comm, count):
    counters = SharedCounters(comm, count)
    yield counters
    comm.Barrier()
    counters.free()


def draw_all(counters, limit, pause=0.0):
    drawn = []
    while (number := counters.add(0, 1)) < limit:
        drawn.append(number)
        time.sleep(pause)
    return drawn


def test_every_number_is_handed_out_once(comm):
    with counters_of(comm, 1) as counters:
        comm.Barrier()
        drawn = draw_all(counters, 2000)
        comm.Barrier()
        assert counters.read(0) == 2000 + comm.size     # each rank drew one number too many, and stopped
    assert drawn == sorted(drawn)
    assert sorted(chain(*comm.allgather(drawn))) == list(range(2000))


def test_slow_ranks_take_fewer(comm):
    with counters_of(comm, 1) as counters:
        comm.Barrier()
        drawn = draw_all(counters, 200, 0.02 if comm.rank == comm.size - 1 > 0 else 0.001)
    taken = comm.allgather(len(drawn))
    assert sum(taken) == 200
    assert comm.size == 1 or 0 < taken[-1] < max(taken)


def test_counters_are_independent(comm):
    with counters_of(comm, 3) as counters:
        assert counters.read(1) >= 0
        comm.Barrier()
        for _ in range(100):
            counters.add(1, 5)
            counters.add(2, comm.rank)
        comm.Barrier()
        found = [counters.read(i) for i in range(3)]
    assert found == [0, 500 * comm.size, 100 * sum(range(comm.size))]


def test_the_first_rank_need_not_take_part(comm, checkpoints):
    """While it waits outside MPI, as it does in a kernel, the others draw."""
    token = comm.bcast(time.monotonic_ns() if comm.rank == 0 else None)
    done = [checkpoints / f"drawn-{token}-{rank}" for rank in range(1, comm.size)]
    with counters_of(comm, 1) as counters:
        drawn = []
        if comm.rank:
            drawn = draw_all(counters, 300)
            done[comm.rank - 1].touch()
        else:
            limit = time.monotonic() + 30
            while not all(path.exists() for path in done):
                assert time.monotonic() < limit, "the others wait for the first rank"
                time.sleep(0.01)
    assert sorted(chain(*comm.allgather(drawn))) == list(range(300 if comm.size > 1 else 0))
    if comm.rank:
        done[comm.rank - 1].unlink()
