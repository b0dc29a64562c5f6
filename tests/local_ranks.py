"""Ranks without MPI, for tests: a thread each, with the few collective calls that loading a model needs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llama_hpc.weights.loader import PeerFailed


class LocalComm:
    """The communicator of one of ``size`` threads; ``slots`` and ``barrier`` are those of all."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.size, self._slots, self._barrier = rank, len(slots), slots, barrier

    def allgather(self, value):
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def gather(self, value, root=0):
        values = self.allgather(value)
        return values if self.rank == root else None


class LocalReducer:
    """What ``TensorReducer`` offers, over a ``LocalComm``."""

    def __init__(self, comm):
        self.comm, self.size = comm, comm.size

    def maximum(self, values):
        values[:] = np.max(self.comm.allgather(values.copy()), axis=0)


def on_ranks(size, function):
    """[function(comm) of every rank]; the first error that is not just the end of another rank is raised."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=60)
    def rank(number):
        try:
            return function(LocalComm(number, slots, barrier))
        except PeerFailed:
            raise                   # Agreed upon: nobody waits for this rank.
        except BaseException:
            barrier.abort()
            raise
    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(rank, number) for number in range(size)]
    errors = [future.exception() for future in done if future.exception() is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, (threading.BrokenBarrierError, PeerFailed))):
        raise error
    return [future.result() for future in done]
