"""Exact joins over a tensor group: sums, maxima, and values of which one rank has each, all of integers."""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.exchange import AllreduceExchange, Exchange, PairExchange
from llama_hpc.kernels.cpu.joining import BITS, MAXIMUM
from llama_hpc.kernels.cpu.memory import address


def own_rows(rows: int, rank: int, size: int) -> range:
    """The rows of a step that are a rank's own where they are dealt over a tensor group."""
    return range(rows * rank // size, rows * (rank + 1) // size)


@dataclass(frozen=True)
class Region:
    """Where ranks write what is to be joined: ``own`` is this rank's part, ``parts`` int64 the addresses of all that are left to
    join when they have met."""

    own: np.ndarray
    parts: np.ndarray


class TensorReducer:
    """Joins over the ranks of one communicator by MPI. Every method is collective over it; one rank needs no call.

    Of the steps of a model, ``calls`` counts joins, ``overlapped`` those during which this rank computed, ``numbers`` and
    ``bytes`` what this rank gave to them, and ``nanoseconds`` (an int64 [1]) the time in which it did nothing else.
    """

    mode = "mpi"
    shares_memory = False

    def __init__(self, comm: MPI.Comm):
        self.comm, self.size = comm, comm.size
        self.calls = self.overlapped = self.bytes = self.numbers = 0
        self.nanoseconds = np.zeros(1, np.int64)

    def region(self, array: np.ndarray) -> Region:
        """A region of this shape and type; ``array`` itself where no other rank can see it."""
        return Region(array, np.array([address(array)]))

    def bring_together(self, steps, region: Region, kind: int, count: np.ndarray) -> None:
        """Appends to a model's ``Steps`` what has to happen before ``region.parts`` can be joined by operations."""
        steps.exchange(self.exchange(region.own, kind), count, self)

    def exchange(self, array: np.ndarray, kind: int) -> Exchange:
        """What joins rows of an array in place, of a kind of ``joining``."""
        made = PairExchange if self.size == 2 else AllreduceExchange
        return made(self.comm, array.view(np.int32) if kind == BITS else array, MPI.MAX if kind == MAXIMUM else MPI.SUM)

    def sum_fixed(self, sums: np.ndarray) -> None:
        """Adds int64 fixed-point sums in place: exact, so independent of order and of the library's algorithm."""
        self._allreduce(sums, MPI.SUM)

    def sum_disjoint(self, values: np.ndarray) -> None:
        """Joins float32 values of which at most one rank holds a nonzero one: the bits are added as integers."""
        self._allreduce(values.view(np.int32), MPI.SUM)

    def maximum(self, values: np.ndarray) -> None:
        """Elementwise maximum of integers, in place."""
        self._allreduce(values, MPI.MAX)

    def _allreduce(self, values: np.ndarray, op: MPI.Op) -> None:
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, values, op=op)

    def work(self) -> dict[str, str | int | float]:
        """What was done since ``reset``."""
        return {"reduce": self.mode, "reductions": self.calls, "overlapped_reductions": self.overlapped,
                "reduce_numbers": self.numbers, "reduce_bytes": self.bytes, "reduce_seconds": float(self.nanoseconds[0]) / 1e9}

    def reset(self) -> None:
        """Sets the counters to zero."""
        self.calls = self.overlapped = self.bytes = self.numbers = 0
        self.nanoseconds[0] = 0

    def common(self, size: int) -> np.ndarray | None:
        """uint8 [size] that all ranks see, at a multiple of 64 bytes; None where they share no memory. Collective."""
        return None

    def scatter_sum(self, sums: np.ndarray) -> None:
        """Adds int64 fixed-point sums [rows, columns] in place, for this rank only those of its own rows (see ``own_rows``)."""
        counts = [len(own_rows(len(sums), rank, self.size)) * sums.shape[1] for rank in range(self.size)]
        own = own_rows(len(sums), self.comm.rank, self.size)
        received = np.empty((len(own), sums.shape[1]), np.int64)
        self.comm.Reduce_scatter(sums, received, counts, MPI.SUM)
        sums[own.start : own.stop] = received

    def gather_rows(self, array: np.ndarray) -> None:
        """Completes an array [rows, …], of which each rank has its own rows, in place."""
        counts = [len(own_rows(len(array), rank, self.size)) * array[:1].nbytes for rank in range(self.size)]
        own = own_rows(len(array), self.comm.rank, self.size)
        whole = np.empty(array.shape, array.dtype)
        self.comm.Allgatherv(np.ascontiguousarray(array[own.start : own.stop]).view(np.uint8).ravel(),
                             (whole.view(np.uint8).ravel(), counts))
        array[...] = whole

    def free(self) -> None:
        """Gives back what regions lie in; nothing may read them any more."""
