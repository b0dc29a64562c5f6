"""What the leader of a replica decides at each step, told to all its ranks."""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.waiting import until_complete

_FAULT, _LAST, _PAUSE, _ADMITTED, _LIMITS, _HEAD = 0, 1, 2, 3, 4, 8


class Outcome:
    """Decisions about one step, one int64 array: a fault code, whether it is the last one, whether to pause behind it as ranks of
    the job are gone, the limits of steps from now on; for every output of the step ``token``, and ``done``, 1 when the sequence
    has ended with it; then the requests that are admitted, at most ``max_seqs``."""

    def __init__(self, max_seqs: int):
        self.data = np.zeros(_HEAD + 3 * max_seqs, np.int64)
        self.token, self.done, self._requests = self.data[_HEAD:].reshape(3, max_seqs)

    @property
    def fault(self) -> int:
        return int(self.data[_FAULT])

    @property
    def last(self) -> bool:
        return bool(self.data[_LAST])

    @property
    def pause(self) -> bool:
        return bool(self.data[_PAUSE])

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """Token budget, prompt tokens, and decoding sequences of a step; pages of the cache."""
        return tuple(self.data[_LIMITS:_HEAD].tolist())

    @property
    def admitted(self) -> np.ndarray:
        """Numbers of the requests that this replica answers from now on."""
        return self._requests[: self.data[_ADMITTED]]

    def decide(self, fault: int, last: bool, limits: tuple[int, int, int, int], admitted: list[int],
               pause: bool = False) -> None:
        """Sets all but tokens and ends."""
        self.data[:_HEAD] = fault, last, pause, len(admitted), *limits
        self._requests[: len(admitted)] = admitted


class Outcomes:
    """Carries outcomes from the leader of ``comm`` to the other ranks while these compute: a ring of ``depth`` steps under way.

    Making and freeing are collective over ``comm``. For each step in turn every rank calls ``post``, then, ``depth`` steps later
    at the latest, ``wait``. Messages go from the leader to each rank directly: no rank has to be inside of MPI for another one's.
    """

    def __init__(self, comm: MPI.Comm, leader: int, depth: int, max_seqs: int):
        self.outcomes = [Outcome(max_seqs) for _ in range(depth)]
        self.leads = comm.rank == leader
        self.comm = comm = comm.Dup()
        others = [rank for rank in range(comm.size) if rank != leader]
        def requests(data: np.ndarray, tag: int) -> list[MPI.Prequest]:
            if self.leads:
                return [comm.Send_init(data, rank, tag) for rank in others]
            return [comm.Recv_init(data, leader, tag)]
        self._requests = [requests(outcome.data, tag) for tag, outcome in enumerate(self.outcomes)]

    def of(self, step: int) -> Outcome:
        """The leader's place for the decisions about a step."""
        return self.outcomes[step % len(self.outcomes)]

    def post(self, step: int) -> None:
        """Sends the step's outcome, or readies a rank to receive it."""
        MPI.Prequest.Startall(self._requests[step % len(self.outcomes)])

    def wait(self, step: int, meanwhile: Callable[[], None] | None = None) -> Outcome:
        """The outcome of a step that was posted; ``meanwhile`` as in ``until_complete``."""
        requests = self._requests[step % len(self.outcomes)]
        until_complete(requests, meanwhile)
        MPI.Request.Waitall(requests)
        return self.of(step)

    def free(self) -> None:
        """Releases the requests, none of which is under way."""
        for request in (request for ring in self._requests for request in ring):
            request.Free()
        self.comm.Free()
