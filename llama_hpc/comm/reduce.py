"""Exact sums over a tensor group."""

import numpy as np
from mpi4py import MPI


class TensorReducer:
    """Sums over the ranks of one tensor communicator. Every method is collective over it; one rank needs no call."""

    def __init__(self, comm: MPI.Comm):
        self.comm, self.size, self.calls = comm, comm.size, 0

    def sum_fixed(self, sums: np.ndarray) -> None:
        """Adds int64 fixed-point sums in place: exact, so independent of order and of the library's algorithm."""
        if self.size > 1:
            self.calls += 1
            self.comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)

    def sum_disjoint(self, values: np.ndarray) -> None:
        """Joins float32 values of which at most one rank holds a nonzero one: the bits are added as integers."""
        if self.size > 1:
            self.calls += 1
            self.comm.Allreduce(MPI.IN_PLACE, values.view(np.int32), op=MPI.SUM)

    def maximum(self, values: np.ndarray) -> None:
        """Elementwise maximum of integers, in place."""
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.MAX)
