"""Timing what several ranks do together, while the ranks that have no part in it sleep."""

import time
from collections.abc import Callable

from mpi4py import MPI

ROUND_SECONDS = 0.01            # of a round at least, except where one repetition takes longer
MOST_REPETITIONS = 10_000
_NAP = 0.002                    # seconds


def sleep_until_all(comm: MPI.Comm) -> None:
    """A barrier that leaves its core to others: ranks that wait for a measurement must not slow it down. Collective."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_NAP)


def slowest_seconds(comm: MPI.Comm, run: Callable[[int], None], times: int) -> float:
    """Seconds a repetition of ``run(times)``, started together, on the rank that takes longest. Collective."""
    comm.Barrier()
    start = time.perf_counter()
    run(times)
    return comm.allreduce((time.perf_counter() - start) / times, MPI.MAX)


def repetitions(comm: MPI.Comm, run: Callable[[int], None]) -> int:
    """How many repetitions make a round; warms up. Collective."""
    run(2)
    return max(1, min(MOST_REPETITIONS, int(ROUND_SECONDS / slowest_seconds(comm, run, 2))))


def count_nodes(comm: MPI.Comm) -> int:
    """Nodes that the ranks are on. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    leader = node.rank == 0
    node.Free()
    return comm.allreduce(int(leader))
