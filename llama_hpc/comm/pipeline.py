"""Activations between the stages of a replica, point to point, through buffers that stay where they are."""

import numpy as np
from mpi4py import MPI

from llama_hpc.kernels.cpu.memory import aligned

AHEAD = 2                       # receives that are posted at any time


class StageChannel:
    """Carries the residual of each step from one stage to the next, and the fault code with it.

    ``comm`` holds the stages of one replica at one tensor index, in order; making and finishing are collective over it.
    Neighbours call ``receive`` and ``send`` for the same steps, with the same rows, in the same order. A stage may send ``depth``
    steps before the next one receives the first; receives are posted ahead, so that a step travels while another is computed.
    """

    def __init__(self, comm: MPI.Comm, depth: int, max_rows: int, hidden_size: int):
        # Its own: a receive that is posted ahead must not meet messages of something else.
        self.comm = comm = comm.Dup()
        self.bytes_sent = 0
        self._received = self._sent = 0
        def messages(count: int) -> list[_Message]:
            return [_Message(max_rows, hidden_size) for _ in range(count)]
        self._incoming = messages(AHEAD if comm.rank > 0 else 0)
        self._outgoing = messages(depth if comm.rank < comm.size - 1 else 0)
        self._receives = [comm.Recv_init(message.data, comm.rank - 1) for message in self._incoming]
        self._sends: list[MPI.Request] = [MPI.REQUEST_NULL] * len(self._outgoing)
        MPI.Prequest.Startall(self._receives)

    def receive(self, residual: np.ndarray, rows: int) -> int:
        """Fills residual[:rows] from the stage before; returns its fault code. The first stage receives nothing."""
        if self.comm.rank == 0:
            return 0
        place = self._received % AHEAD
        self._received += 1
        message = self._incoming[place]
        self._receives[place].Wait()
        residual[:rows] = message.residual[:rows]
        fault = int(message.fault[0])
        self._receives[place].Start()
        return fault

    def send(self, residual: np.ndarray, rows: int, fault: int) -> None:
        """Sends residual[:rows] to the next stage while this one goes on; the last stage sends nothing."""
        if self.comm.rank == self.comm.size - 1:
            return
        place = self._sent % len(self._sends)
        self._sent += 1
        self._sends[place].Wait()
        message = self._outgoing[place]
        message.fault[0] = fault
        message.residual[:rows] = residual[:rows]
        data = message.of(rows)
        self._sends[place] = self.comm.Isend(data, self.comm.rank + 1)
        self.bytes_sent += data.nbytes

    def finish(self) -> None:
        """Waits for the last sends, and takes back the receives that nothing will arrive for."""
        MPI.Request.Waitall(self._sends)
        for request in self._receives:
            request.Cancel()
            request.Wait()
            request.Free()
        self._receives = []
        self.comm.Free()


class _Message:
    """One buffer: an int64 fault code, then float32 rows of the residual."""

    def __init__(self, max_rows: int, hidden_size: int):
        self.data = aligned(2 + max_rows * hidden_size, np.float32)
        self.fault = self.data[:2].view(np.int64)
        self.residual = self.data[2:].reshape(max_rows, hidden_size)

    def of(self, rows: int) -> np.ndarray:
        """The part that carries so many rows."""
        return self.data[: 2 + rows * self.residual.shape[1]]
