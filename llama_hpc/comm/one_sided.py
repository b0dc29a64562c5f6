"""Joins in the manner of a partitioned global address space: each rank puts its part into the windows of all others."""

import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.exchange import Exchange
from llama_hpc.comm.reduce import Region, TensorReducer
from llama_hpc.errors import RankLost
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.cpu.waiting import Alarm

_LOOKS = 1000                   # at the flags before other processes get the core


@dataclass(frozen=True)
class PutRegion(Region):
    """A region with a window: ``parts`` are this rank's own part and what the others put beside it, in the order of ranks."""

    window: MPI.Win


class OneSidedReducer(TensorReducer):
    """Joins by one-sided puts: data, then a flag with the number of the join. No rank needs another one's help.

    Making it, ``region`` and ``free`` are collective over ``comm``. A slot is written again after another join at the earliest,
    whose flags say that everybody has read it.
    """

    mode = "one-sided"

    def __init__(self, comm: MPI.Comm, alarm: Alarm | None = None):
        super().__init__(comm)
        self._alarm = alarm
        self._others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._flags_window = MPI.Win.Allocate(8 * comm.size, 8, comm=comm)
        self._flags = np.frombuffer(self._flags_window.tomemory(), np.int64)
        self._flags[:] = 0
        self._joins = np.zeros(1, np.int64)
        comm.Barrier()
        self._flags_window.Lock_all()
        self._windows: list[MPI.Win] = []

    def region(self, array: np.ndarray) -> Region:
        window = MPI.Win.Allocate(array.nbytes * self.size, 1, comm=self.comm)
        window.Lock_all()
        self._windows.append(window)
        received = np.frombuffer(window.tomemory(), np.uint8)
        received = received[: array.nbytes * self.size].view(array.dtype).reshape(self.size, *array.shape)
        own = np.zeros(array.shape, array.dtype)
        parts = [address(own if rank == self.comm.rank else received[rank]) for rank in range(self.size)]
        return PutRegion(own, np.array(parts, np.int64), window)

    def bring_together(self, steps, region: PutRegion, kind: int, count: np.ndarray) -> None:
        steps.exchange(_PutExchange(self, region), count, self)

    def put(self, window: MPI.Win, part: np.ndarray, place: int) -> int:
        """Everybody's slot of this rank gets ``part``. Returns the number of the join."""
        self._joins += 1
        for rank in self._others:
            window.Put(part, rank, (place, part.nbytes, MPI.BYTE))
        window.Flush_all()
        for rank in self._others:
            self._flags_window.Put(self._joins, rank, (self.comm.rank, 1, MPI.INT64_T))
        self._flags_window.Flush_all()
        self._flags[self.comm.rank] = self._joins[0]
        return int(self._joins[0])

    def wait(self, window: MPI.Win, join: int) -> None:
        """Returns when all slots of this rank are filled. Raises RankLost when the alarm rings."""
        looks = 0
        while self._flags.min() < join:
            self.test()
            looks += 1
            if looks % _LOOKS == 0:
                time.sleep(0)
                if self._alarm and self._alarm.look():
                    raise RankLost("a rank of this tensor group is gone")
        window.Sync()

    def test(self) -> None:
        """Lets the library do what others ask of it."""
        self._flags_window.Sync()
        self.comm.Iprobe()

    def free(self) -> None:
        for window in (self._flags_window, *self._windows):
            window.Unlock_all()
            window.Free()
        self._windows = []


class _PutExchange(Exchange):
    """A join of one region."""

    def __init__(self, reducer: OneSidedReducer, region: PutRegion):
        self._reducer, self._region, self._join = reducer, region, 0
        self.test = reducer.test

    def start(self, rows: int) -> None:
        own = self._region.own
        self._join = self._reducer.put(self._region.window, own[:rows], self._reducer.comm.rank * own.nbytes)

    def wait(self) -> None:
        self._reducer.wait(self._region.window, self._join)
