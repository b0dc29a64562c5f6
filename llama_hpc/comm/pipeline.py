"""Activations between the stages of a replica, point to point, one buffer for every micro-batch in flight."""

import numpy as np
from mpi4py import MPI


class StageChannel:
    """Carries the residual of each micro-batch from one stage to the next, and the fault code with it.

    ``comm`` holds the stages of one replica at one tensor index, in order. Neighbours must call ``receive`` and ``send``
    for the same micro-batches in the same order with the same rows.
    """

    def __init__(self, comm: MPI.Comm, micro_batches: int, max_rows: int, hidden_size: int):
        self.comm = comm
        self.bytes_sent = 0
        self._incoming = _Message(max_rows if comm.rank > 0 else 0, hidden_size)
        rows = max_rows if comm.rank < comm.size - 1 else 0
        self._outgoing = [_Message(rows, hidden_size) for _ in range(micro_batches)]
        self._sends: list[MPI.Request] = [MPI.REQUEST_NULL] * micro_batches

    def receive(self, micro_batch: int, residual: np.ndarray, rows: int) -> int:
        """Fills residual[:rows] from the stage before; returns its fault code. The first stage receives nothing."""
        if self.comm.rank == 0:
            return 0
        self.comm.Recv(self._incoming.of(rows), self.comm.rank - 1, micro_batch)
        residual[:rows] = self._incoming.residual[:rows]
        return int(self._incoming.fault[0])

    def send(self, micro_batch: int, residual: np.ndarray, rows: int, fault: int) -> None:
        """Sends residual[:rows] to the next stage while this one goes on; the last stage sends nothing."""
        if self.comm.rank == self.comm.size - 1:
            return
        self._sends[micro_batch].Wait()
        message = self._outgoing[micro_batch]
        message.fault[0] = fault
        message.residual[:rows] = residual[:rows]
        data = message.of(rows)
        self._sends[micro_batch] = self.comm.Isend(data, self.comm.rank + 1, micro_batch)
        self.bytes_sent += data.nbytes

    def finish(self) -> None:
        """Waits for the last sends."""
        MPI.Request.Waitall(self._sends)


class _Message:
    """One buffer: an int64 fault code, then float32 rows of the residual."""

    def __init__(self, max_rows: int, hidden_size: int):
        self._data = np.zeros(2 + max_rows * hidden_size, np.float32)
        self.fault = self._data[:2].view(np.int64)
        self.residual = self._data[2:].reshape(max_rows, hidden_size)

    def of(self, rows: int) -> np.ndarray:
        """The part that carries so many rows."""
        return self._data[: 2 + rows * self.residual.shape[1]]
