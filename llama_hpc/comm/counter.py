"""Counters that all ranks share: who takes which prompt, and how far the job is."""

import numpy as np
from mpi4py import MPI


class SharedCounters:
    """int64 counters on the first rank of ``comm``, read and raised from any rank without that rank's help.

    Making and freeing are collective over ``comm``; ``add`` and ``read`` are not (passive one-sided operations). A world of
    one rank needs no window.
    """

    def __init__(self, comm: MPI.Comm, count: int):
        self.comm, self._window = comm, None
        self._one, self._old = np.zeros(1, np.int64), np.zeros(1, np.int64)
        if comm.size == 1:
            self._local = np.zeros(count, np.int64)
            return
        size = count * 8 if comm.rank == 0 else 0
        self._window = MPI.Win.Allocate(size, 8, comm=comm)
        if comm.rank == 0:
            self._window.Lock(0)
            np.frombuffer(self._window.tomemory(), np.int64)[:] = 0
            self._window.Unlock(0)
        comm.Barrier()
        self._window.Lock_all()

    def add(self, counter: int, value: int) -> int:
        """Raises a counter; returns what it was before."""
        if self._window is None:
            old = int(self._local[counter])
            self._local[counter] += value
            return old
        self._one[0] = value
        self._window.Fetch_and_op(self._one, self._old, 0, counter, MPI.SUM if value else MPI.NO_OP)
        self._window.Flush(0)
        return int(self._old[0])

    def read(self, counter: int) -> int:
        """The counter's value now."""
        return self.add(counter, 0)

    def free(self) -> None:
        """Collective over ``comm``."""
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
            self._window = None
