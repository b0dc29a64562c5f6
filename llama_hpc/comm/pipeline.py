"""Activations between the stages of a replica, point to point, one buffer for every micro-batch in flight."""

import numpy as np
from mpi4py import MPI


class StageChannel:
    """Carries the residual of each micro-batch from one stage to the next, and the fault code with it.

    ``comm`` holds the stages of one replica at one tensor index, in order. Neighbours must call ``receive`` and ``send``
    for the same micro-batches in the same order with the same rows.
    """

    def __init__(self, comm: MPI.Comm, micro_batches: int, max_rows: int, hidden_size: int):
        self.comm, self.hidden_size = comm, hidden_size
        self.bytes_sent = 0
        length = max_rows * hidden_size + 2
        def buffers(needed: bool) -> list[np.ndarray]:
            return [np.zeros(length if needed else 0, np.float32) for _ in range(micro_batches)]
        self._incoming = np.zeros(length if comm.rank > 0 else 0, np.float32)
        self._outgoing = buffers(comm.rank < comm.size - 1)
        self._sends: list[MPI.Request] = [MPI.REQUEST_NULL] * micro_batches

    def receive(self, micro_batch: int, residual: np.ndarray, rows: int) -> int:
        """Fills residual[:rows] from the stage before; returns its fault code. The first stage receives nothing."""
        if self.comm.rank == 0:
            return 0
        size = rows * self.hidden_size
        message = self._incoming[: size + 2]
        self.comm.Recv(message, self.comm.rank - 1, micro_batch)
        residual[:rows] = message[:size].reshape(rows, self.hidden_size)
        return int(message[size:].copy().view(np.int64)[0])

    def send(self, micro_batch: int, residual: np.ndarray, rows: int, fault: int) -> None:
        """Sends residual[:rows] to the next stage while this one goes on; the last stage sends nothing."""
        if self.comm.rank == self.comm.size - 1:
            return
        self._sends[micro_batch].Wait()
        size = rows * self.hidden_size
        message = self._outgoing[micro_batch][: size + 2]
        message[:size] = residual[:rows].reshape(-1)
        message[size:] = np.array([fault], np.int64).view(np.float32)
        self._sends[micro_batch] = self.comm.Isend(message, self.comm.rank + 1, micro_batch)
        self.bytes_sent += message.nbytes

    def finish(self) -> None:
        """Waits for the last sends."""
        MPI.Request.Waitall(self._sends)
