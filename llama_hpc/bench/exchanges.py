"""The exchanges between ranks that are timed: MPI's, and those through memory that ranks of a node share.

Sizes and bandwidths are those of nccl-tests and the OSU benchmarks. The size of ``allreduce`` and the windows is what each rank
gives, that of ``allgather`` what each rank has in the end, that of ``alltoall`` what each rank gives to all ranks together, that
of the exchanges of a pair one message. The algorithm bandwidth is size / time. The bus bandwidth, which can be compared with what
the hardware does whatever the number of ranks n, is this times 2 (n - 1) / n for sums over all ranks, (n - 1) / n for
``allgather`` and ``alltoall``, 1 for what goes one way, and 2 for what goes both ways at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.kernels.cpu import window_probes
from llama_hpc.kernels.cpu.memory import address

WORD = 8                        # bytes; every buffer is a whole number of int64
_LOOKS = 20_000                 # at a flag before sleeping, some tens of microseconds
_TAG = 1


class _Calls:
    """An exchange by calls of MPI: ``call`` fills ``received``, in which ``expected`` should be then."""

    def __init__(self, call: Callable[[], object], received: np.ndarray, expected: np.ndarray):
        self._call, self._received, self._expected = call, received, expected

    def run(self, times: int) -> None:
        """So many times. Collective, as all methods."""
        for _ in range(times):
            self._call()

    def is_right(self) -> bool:
        """Whether one exchange brings this rank what it should."""
        self._received[...] = -1
        self.run(1)
        return np.array_equal(self._received, self._expected)

    def free(self) -> None:
        """Nothing but memory of this process."""


def _numbers(words: int, rank: int) -> np.ndarray:
    """int64 that tell ranks and places apart."""
    return np.arange(words, dtype=np.int64) * 0x9E3779B1 + (rank + 1)


def _allreduce(comm: MPI.Comm, words: int) -> _Calls:
    sent, received = _numbers(words, comm.rank), np.empty(words, np.int64)
    expected = sum(_numbers(words, rank) for rank in range(comm.size))
    return _Calls(lambda: comm.Allreduce(sent, received, MPI.SUM), received, expected)


def _allreduce_bits(comm: MPI.Comm, words: int) -> _Calls:
    # As the engine joins float32 of which one rank at most holds a nonzero one: their bits are added as int32.
    expected = _numbers(words, 0).view(np.int32)
    mine = np.arange(2 * words) % comm.size == comm.rank
    sent, received = np.where(mine, expected, np.int32(0)), np.empty_like(expected)
    return _Calls(lambda: comm.Allreduce(sent, received, MPI.SUM), received, expected)


def _allgather(comm: MPI.Comm, words: int) -> _Calls:
    share, received = words // comm.size, np.empty(words, np.int64)
    sent, expected = _numbers(share, comm.rank), np.concatenate([_numbers(share, rank) for rank in range(comm.size)])
    return _Calls(lambda: comm.Allgather(sent, received), received, expected)


def _alltoall(comm: MPI.Comm, words: int) -> _Calls:
    share, received = words // comm.size, np.empty(words, np.int64)
    def between(sender: int, receiver: int) -> np.ndarray:
        return _numbers(share, sender * comm.size + receiver)
    sent = np.concatenate([between(comm.rank, rank) for rank in range(comm.size)])
    expected = np.concatenate([between(rank, comm.rank) for rank in range(comm.size)])
    return _Calls(lambda: comm.Alltoall(sent, received), received, expected)


def _pingpong(comm: MPI.Comm, words: int) -> _Calls:
    sent, received = _numbers(words, 0), np.empty(words, np.int64)
    def first() -> None:
        comm.Send(sent, 1, _TAG)
        comm.Recv(received, 1, _TAG)
    def second() -> None:
        comm.Recv(received, 0, _TAG)
        comm.Send(received, 0, _TAG)
    return _Calls(second if comm.rank else first, received, sent)


def _both_ways(comm: MPI.Comm, words: int) -> _Calls:
    other, sent, received = 1 - comm.rank, _numbers(words, comm.rank), np.empty(words, np.int64)
    return _Calls(lambda: comm.Sendrecv(sent, other, _TAG, received, other, _TAG), received, _numbers(words, other))


class _Window:
    """An exchange by compiled code in memory that all ranks of ``comm``, on one node, see: MPI allocates it, no more."""

    def __init__(self, comm: MPI.Comm, words: int, function, expected: np.ndarray, givers: int):
        self._window = MPI.Win.Allocate_shared(window_probes.part_bytes(words), 1, comm=comm)
        parts = [np.frombuffer(self._window.Shared_query(rank)[0], np.int64) for rank in range(comm.size)]
        parts[comm.rank][:] = 0
        parts[comm.rank][window_probes.DATA // WORD :][:words] = _numbers(words, comm.rank)
        self._rank, self._words, self._function, self._expected = comm.rank, words, function, expected
        self._parts, self._received = np.array([address(part) for part in parts]), np.empty(words, np.int64)
        self._givers, self._next = givers, 1
        comm.Barrier()

    def run(self, times: int) -> None:
        """So many times. Collective, as all methods."""
        self._function(self._parts, self._rank, self._words, self._received, self._next, times, _LOOKS)
        self._next += times

    def is_right(self) -> bool:
        """Whether one exchange brings this rank what it should; the numbers of repetitions in it come from ``givers`` ranks."""
        self._received[...] = -1
        self._expected[:: window_probes.FRESH] = self._next * self._givers
        self.run(1)
        return np.array_equal(self._received, self._expected)

    def free(self) -> None:
        """Gives the window back."""
        self._window.Free()


def _window_copy(comm: MPI.Comm, words: int) -> _Window:
    return _Window(comm, words, window_probes.copy_from_next, _numbers(words, (comm.rank + 1) % comm.size), 1)


def _window_sum(comm: MPI.Comm, words: int) -> _Window:
    expected = sum(_numbers(words, rank) for rank in range(comm.size))
    return _Window(comm, words, window_probes.sum_of_all, expected, comm.size)


@dataclass(frozen=True)
class Operation:
    """A kind of exchange: how it is made for a communicator and a number of int64, bus over algorithm bandwidth for n ranks.

    ``divided``: the buffer holds equal shares of all ranks; ``pair``: between two ranks; ``trips``: messages one after the other
    in a repetition; ``shared``: inside a node only.
    """

    make: Callable[[MPI.Comm, int], _Calls | _Window]
    bus: Callable[[int], float]
    divided: bool = False
    pair: bool = False
    trips: int = 1
    shared: bool = False

    def words(self, size: int, ranks: int) -> int:
        """int64 of a buffer of so many bytes, shares rounded up."""
        parts = ranks if self.divided else 1
        return -(-size // (WORD * parts)) * parts


def _sums(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _shares(ranks: int) -> float:
    return (ranks - 1) / ranks


OPERATIONS = {
    "allreduce": Operation(_allreduce, _sums),
    "allreduce-bits": Operation(_allreduce_bits, _sums),
    "allgather": Operation(_allgather, _shares, divided=True),
    "alltoall": Operation(_alltoall, _shares, divided=True),
    "pingpong": Operation(_pingpong, lambda _: 1, pair=True, trips=2),
    "both-ways": Operation(_both_ways, lambda _: 2, pair=True),
    "window-copy": Operation(_window_copy, lambda _: 1, shared=True),
    "window-sum": Operation(_window_sum, _sums, shared=True),
}
