"""What the leader of a replica decides at each step, told to all its ranks."""

import numpy as np
from mpi4py import MPI

NONE = -1


class Outcome:
    """Decisions about one micro-batch, one int64 array: a fault code, and for every slot ``token``, ``done``, ``admit``.

    ``token``: what was sampled (NONE: nothing); ``done``: 1 when the sequence has ended; ``admit``: the request that
    takes the slot next (NONE: nobody).
    """

    def __init__(self, slots: int):
        self.data = np.zeros(1 + 3 * slots, np.int64)
        self.token, self.done, self.admit = self.data[1:].reshape(3, slots)

    @property
    def fault(self) -> int:
        return int(self.data[0])

    @fault.setter
    def fault(self, code: int) -> None:
        self.data[0] = code

    def clear(self) -> None:
        self.data[0] = 0
        self.token[:] = self.admit[:] = NONE
        self.done[:] = 0


class OutcomeBroadcast:
    """Broadcasts outcomes from the leader of ``comm`` while the ranks compute other micro-batches.

    ``post`` is collective over ``comm`` and called for the same micro-batches in the same order on every rank; ``wait``
    ends the last ``post`` of that micro-batch.
    """

    def __init__(self, comm: MPI.Comm, leader: int, micro_batches: int, slots: int):
        self.comm, self.leader = comm, leader
        self.outcomes = [Outcome(slots) for _ in range(micro_batches)]
        self._requests: list[MPI.Request] = [MPI.REQUEST_NULL] * micro_batches

    def post(self, micro_batch: int) -> None:
        if self.comm.size > 1:
            self._requests[micro_batch] = self.comm.Ibcast(self.outcomes[micro_batch].data, self.leader)

    def wait(self, micro_batch: int) -> Outcome:
        self._requests[micro_batch].Wait()
        return self.outcomes[micro_batch]
