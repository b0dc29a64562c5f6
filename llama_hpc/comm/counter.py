"""Counters that all ranks share: who takes which prompt, and how far the job is."""

import fcntl
import os
from pathlib import Path

import numpy as np
from mpi4py import MPI

from llama_hpc.errors import ResultsError


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

    def let_others(self) -> None:
        """First rank, often: lets the library do what others ask of this rank's memory."""
        self.comm.Iprobe()

    def free(self) -> None:
        """Collective over ``comm``."""
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
            self._window = None


class FileCounters:
    """``SharedCounters`` in a file that all ranks can write, for jobs that outlive ranks: MPI's windows do not.

    Not collective. Locks by flock(2) end with a process. ``comm`` is that of the ranks that are alive. Raises ResultsError.
    """

    def __init__(self, path: Path, comm: MPI.Comm):
        self.comm, self._path = comm, path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ResultsError(f"cannot count in {path}: {error.strerror}") from None

    def add(self, counter: int, value: int) -> int:
        """Raises a counter; returns what it was before."""
        return self._change(counter, lambda old: old + value)

    def set(self, counter: int, value: int) -> None:
        """Gives a counter a value."""
        self._change(counter, lambda old: value)

    def read(self, counter: int) -> int:
        """The counter's value now."""
        return self._change(counter, lambda old: old)

    def let_others(self) -> None:
        """Nobody needs another rank's help."""

    def _change(self, counter: int, change) -> int:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                old = int.from_bytes(os.pread(self._file, 8, 8 * counter), "little")
                if (new := change(old)) != old:
                    os.pwrite(self._file, new.to_bytes(8, "little"), 8 * counter)
                return old
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            raise ResultsError(f"cannot count in {self._path}: {error.strerror}: a job that is to outlive ranks needs an output "
                               "on a file system with locks (flock)") from None

    def free(self) -> None:
        """Nothing is counted any more."""
        os.close(self._file)
