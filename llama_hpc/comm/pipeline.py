"""Activations between the stages of a replica, point to point, through buffers that stay where they are."""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.exchange import PIECE
from llama_hpc.comm.waiting import until_complete
from llama_hpc.kernels.cpu.memory import aligned

AHEAD = 2                       # steps whose receives are posted at any time


class StageChannel:
    """Carries the residual of each step from one stage to the next, and the fault code with it.

    ``comm`` holds the stages of one replica at one tensor index, in order; making and finishing are collective over it.
    Neighbours call ``receive`` and ``send`` for the same steps, with the same rows, in the same order. A stage may send ``depth``
    steps before the next one receives the first; receives are posted ahead, so that a step travels while another is computed.
    Between nodes it travels in pieces that MPI sends at once (see ``comm.exchange``): of a larger message nothing would move
    before both stages had called MPI again.
    """

    def __init__(self, comm: MPI.Comm, depth: int, max_rows: int, hidden_size: int):
        # Its own: a receive that is posted ahead must not meet messages of something else.
        self.comm = comm = comm.Dup()
        self.bytes_sent = 0
        self._received = self._sent = 0
        nodes = _nodes(comm)
        def messages(count: int, other: int) -> list[_Message]:
            near = not 0 <= other < comm.size or nodes[other] == nodes[comm.rank]
            return [_Message(comm, other, place, max_rows, hidden_size, None if near else PIECE) for place in range(count)]
        self._incoming = messages(AHEAD if comm.rank > 0 else 0, comm.rank - 1)
        self._outgoing = messages(depth if comm.rank < comm.size - 1 else 0, comm.rank + 1)
        for message in self._incoming:
            message.post(1)

    def receive(self, residual: np.ndarray, rows: int, meanwhile: Callable[[], None] | None = None) -> int:
        """Fills residual[:rows] from the stage before; returns its fault code. The first stage receives nothing. ``meanwhile`` as
        in ``until_complete``."""
        if self.comm.rank == 0:
            return 0
        message = self._incoming[self._received % AHEAD]
        self._received += 1
        return message.take(residual, rows, meanwhile)

    def send(self, residual: np.ndarray, rows: int, fault: int) -> None:
        """Sends residual[:rows] to the next stage while this one goes on; the last stage sends nothing."""
        if self.comm.rank == self.comm.size - 1:
            return
        message = self._outgoing[self._sent % len(self._outgoing)]
        self.bytes_sent += message.send(residual, rows, fault, self._sent % AHEAD)
        self._sent += 1

    def finish(self) -> None:
        """Waits for the last sends, and takes back the receives that nothing will arrive for."""
        for message in (*self._outgoing, *self._incoming):
            message.finish()
        self.comm.Free()


def _nodes(comm: MPI.Comm) -> list[int]:
    """For each rank a number of its node. Collective over ``comm``."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    number = node.bcast(comm.rank)
    node.Free()
    return comm.allgather(number)


class _Message:
    """One buffer: an int64 fault code, then float32 rows of the residual, and what carries it to or from rank ``other`` in
    pieces of so many bytes (None: in one). ``place``: number of the step, modulo AHEAD, whose receives it posts."""

    def __init__(self, comm: MPI.Comm, other: int, place: int, max_rows: int, hidden_size: int, piece: int | None):
        self.comm, self.other, self.place = comm, other, place
        self.data = aligned(2 + max_rows * hidden_size, np.float32)
        self.fault = self.data[:2].view(np.int64)
        self.residual = self.data[2:].reshape(max_rows, hidden_size)
        self._piece = piece // self.data.itemsize if piece else self.data.size
        self._receives: list[MPI.Prequest] = []     # of piece after piece, all under way
        self._sends: list[MPI.Request] = []

    def _cut(self, size: int) -> list[slice]:
        return [slice(first, min(first + self._piece, size)) for first in range(0, size, self._piece)]

    def post(self, count: int) -> None:
        """Readies receives of so many pieces at least. One that nothing arrives for serves a later step of this place."""
        for number in range(len(self._receives), count):
            part = self.data[number * self._piece : (number + 1) * self._piece]
            self._receives.append(self.comm.Recv_init(part, self.other, AHEAD * number + self.place))
            self._receives[-1].Start()

    def take(self, residual: np.ndarray, rows: int, meanwhile: Callable[[], None] | None) -> int:
        """Waits for a message, moves it to residual[:rows], and readies for another one; returns its fault code."""
        count = len(self._cut(2 + rows * self.residual.shape[1]))
        self.post(count)
        until_complete(self._receives[:count], meanwhile)
        MPI.Request.Waitall(self._receives[:count])
        residual[:rows] = self.residual[:rows]
        fault = int(self.fault[0])
        MPI.Prequest.Startall(self._receives[:count])
        return fault

    def send(self, residual: np.ndarray, rows: int, fault: int, place: int) -> int:
        """Sends residual[:rows] and a fault code when the last message has left; returns the bytes."""
        MPI.Request.Waitall(self._sends)
        self.fault[0] = fault
        self.residual[:rows] = residual[:rows]
        parts = self._cut(2 + rows * self.residual.shape[1])
        self._sends = [self.comm.Isend(self.data[part], self.other, AHEAD * number + place) for number, part in enumerate(parts)]
        return parts[-1].stop * self.data.itemsize

    def finish(self) -> None:
        """Waits for what was sent; gives receives up."""
        MPI.Request.Waitall(self._sends)
        for request in self._receives:
            request.Cancel()
            request.Wait()
            request.Free()
        self._receives = []
