"""Exact joins over a tensor group: sums, maxima, and values of which one rank has each, all of integers."""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.kernels.cpu.joining import BITS, FINISH, MAXIMUM, SUM
from llama_hpc.kernels.cpu.memory import address


@dataclass(frozen=True)
class Region:
    """Where ranks write what is to be joined: ``own`` is this rank's part, ``parts`` int64 the addresses of all that are left to
    join when they have met."""

    own: np.ndarray
    parts: np.ndarray


class TensorReducer:
    """Joins over the ranks of one communicator by MPI. Every method is collective over it; one rank needs no call.

    Of the steps of a model, ``calls`` counts joins, ``bytes`` what this rank gave to them, and ``nanoseconds`` (an int64 [1]) the
    time that they took.
    """

    mode = "mpi"

    def __init__(self, comm: MPI.Comm):
        self.comm, self.size, self.calls, self.bytes = comm, comm.size, 0, 0
        self.nanoseconds = np.zeros(1, np.int64)

    def region(self, array: np.ndarray) -> Region:
        """A region of this shape and type; ``array`` itself where no other rank can see it."""
        return Region(array, np.array([address(array)]))

    def bring_together(self, steps, region: Region, kind: int, count: np.ndarray) -> None:
        """Appends to a model's ``Steps`` what has to happen before ``region.parts`` can be joined by operations."""
        steps.call(self.function(kind), region.own, count)

    def function(self, kind: int):
        """What joins an array in place."""
        return {SUM: self.sum_fixed, FINISH: self.sum_fixed, BITS: self.sum_disjoint, MAXIMUM: self.maximum}[kind]

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
        return {"reduce": self.mode, "reductions": self.calls, "reduce_bytes": self.bytes,
                "reduce_seconds": float(self.nanoseconds[0]) / 1e9}

    def reset(self) -> None:
        """Sets the counters to zero."""
        self.calls = self.bytes = 0
        self.nanoseconds[0] = 0

    def free(self) -> None:
        """Gives back what regions lie in; nothing may read them any more."""
