"""Joins through windows that ranks of a node share: flags and copies by compiled code, no MPI call inside of a node."""

import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.exchange import Exchange
from llama_hpc.comm.reduce import Region, TensorReducer
from llama_hpc.kernels.cpu.joining import FINISH, MEETING_WORDS, SUM
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.cpu.waiting import Alarm, spins_in

SHARED_FOLDER = "/dev/shm"      # of files in memory, on Linux

_SPIN_SECONDS = 1e-3            # of a rank with cores of its own, before it sleeps
_CROWDED_SECONDS = 2e-6         # where ranks share cores


class SharedWindows:
    """Memory that the ranks of ``comm``, all on one node, share. ``allocate`` and ``meeting_point`` are collective over it.

    Files in memory, which no longer have a name when they are used: unlike the windows of an MPI library they outlive a rank.
    """

    def __init__(self, comm: MPI.Comm, alarm: Alarm | None = None):
        self.comm, self._alarm = comm, alarm
        self._maps: list[mmap.mmap] = []

    def allocate(self, size: int) -> list[np.ndarray]:
        """The memory of every rank, uint8 from the start of a page on: of this one ``size`` bytes. Where ranks have a part each,
        it lies in memory near the one that first writes it."""
        path = _new_file(size) if size else ""
        paths = self.comm.allgather((path, size))
        parts = [_mapped(*part) if part[1] else None for part in paths]
        self.comm.Barrier()
        if path:
            os.unlink(path)
        self._maps += [part for part in parts if part is not None]
        return [np.frombuffer(b"" if part is None else part, np.uint8) for part in parts]

    def meeting_point(self, crowded: bool, spent: np.ndarray) -> dict[str, int]:
        """Where the ranks meet, as operations want it. ``crowded``: more threads than cores: who waits had better sleep."""
        size = 8 * MEETING_WORDS
        parts = self.allocate(size if self.comm.rank == 0 else 0)
        parts[0][:size] = 0
        self.comm.Barrier()
        spins = spins_in(_CROWDED_SECONDS if crowded else _SPIN_SECONDS)
        return {"meeting": address(parts[0]), "ranks": self.comm.size, "spins": spins, "spent": address(spent),
                "alarm": self._alarm.address if self._alarm else 0}

    def free(self) -> None:
        """Nothing may touch the memory any more; it goes when the last array that lies in it does."""
        self._maps = []


def _new_file(size: int) -> str:
    descriptor, path = tempfile.mkstemp(prefix="llama_hpc-", dir=SHARED_FOLDER)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
    return path


def _mapped(path: str, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _like(array: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """The first bytes of a memory as an array of the same shape and type."""
    return memory[: array.nbytes].view(array.dtype).reshape(array.shape)


class SharedReducer(TensorReducer):
    """Joins over ranks that share memory: each writes its part, all meet, each reads all parts.

    A part may be written again after another join, when everybody has read it: no step begins with the region that it ends with.

    Making it, ``region`` and ``free`` are collective over ``comm``. Joins outside of steps, as while loading, are those of MPI.
    """

    mode = "shared"
    shares_memory = True

    def __init__(self, comm: MPI.Comm, crowded: bool, alarm: Alarm | None = None):
        super().__init__(comm)
        self._windows = SharedWindows(comm, alarm)
        self._meeting = self._windows.meeting_point(crowded, self.nanoseconds)

    def region(self, array: np.ndarray) -> Region:
        parts = self._windows.allocate(array.nbytes)
        return Region(_like(array, parts[self.comm.rank]), np.array([address(part) for part in parts], np.int64))

    def common(self, size: int) -> np.ndarray:
        return self._windows.allocate(size if self.comm.rank == 0 else 0)[0][:size]

    def meet(self, steps) -> None:
        """Appends a meeting of all ranks to a model's ``Steps``."""
        steps.meet(self._meeting)

    def bring_together(self, steps, region: Region, kind: int, count: np.ndarray) -> None:
        self.meet(steps)

    def free(self) -> None:
        self._windows.free()


@dataclass(frozen=True)
class NodeRegion(Region):
    """A region of a node: ``parts`` is the address of ``whole``, what all nodes' parts make; ``own_node`` int64, the addresses of
    this node's parts."""

    whole: np.ndarray
    own_node: np.ndarray


class CombinedReducer(TensorReducer):
    """Joins over several nodes with several ranks each: in shared memory, then by MPI between the nodes' first ranks.

    Making it, ``region`` and ``free`` are collective over ``comm``; ``node`` holds its ranks on this node.
    """

    mode = "combined"

    def __init__(self, comm: MPI.Comm, node: MPI.Comm, crowded: bool, alarm: Alarm | None = None):
        super().__init__(comm)
        self._leads, self._windows = node.rank == 0, SharedWindows(node, alarm)
        self._meeting = self._windows.meeting_point(crowded, self.nanoseconds)
        leaders = comm.Split(0 if self._leads else MPI.UNDEFINED, comm.rank)
        self._between = TensorReducer(leaders) if self._leads else None

    def region(self, array: np.ndarray) -> Region:
        parts = self._windows.allocate(array.nbytes)
        whole = self._windows.allocate(array.nbytes if self._leads else 0)[0]
        return NodeRegion(_like(array, parts[self._windows.comm.rank]), np.array([address(whole)]), _like(array, whole),
                          np.array([address(part) for part in parts]))

    def bring_together(self, steps, region: NodeRegion, kind: int, count: np.ndarray) -> None:
        steps.meet(self._meeting)
        if self._leads:
            steps.add_join(region.own_node, SUM if kind == FINISH else kind, count, region.whole, reducer=self)
        # Ranks that lead no node have no part in it, but come to the next meeting behind it as the others do.
        steps.exchange(self._between.exchange(region.whole, kind) if self._leads else Exchange(), count, self)
        steps.meet(self._meeting)

    def free(self) -> None:
        self._windows.free()
        if self._between is not None:
            self._between.comm.Free()
