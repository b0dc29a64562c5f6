"""Exchanges over the ranks of a tensor group: each is started, and waited for at once or when something else was computed.

Sums, maxima and bits of integers: exact, so independent of order and of the library's algorithm.
"""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

# Bytes of a message of ``PairExchange``. MPI libraries send so little at once, without asking the receiver, and the system's
# buffers take it: it travels while nobody calls MPI. Of larger ones nothing moves before both ranks have called.
PIECE = 32 << 10
_TAG, _TAGS = 1, 1 << 14        # of pieces, one after the other


class Exchange:
    """Joins the first rows of an array of each rank, in place. Every method is collective, in the same order on every rank.

    Another exchange may be under way between ``start`` and ``wait``, not this one. ``test`` need not be called: it helps the
    library to get on.
    """

    def start(self, rows: int) -> None:
        """Begins; this rank leaves the rows alone until ``wait`` returns."""

    def test(self) -> None:
        """Lets the library do what it can do now."""

    def wait(self) -> None:
        """Returns when the rows are joined."""

    def run(self, rows: int) -> None:
        """All of it."""
        self.start(rows)
        self.wait()


class Call(Exchange):
    """``function(array[:rows])``, which returns when everything is done."""

    def __init__(self, function: Callable[[np.ndarray], None], array: np.ndarray):
        self._function, self._array = function, array

    def start(self, rows: int) -> None:
        self._function(self._array[:rows])


class AllreduceExchange(Exchange):
    """By the library's own collective operations."""

    def __init__(self, comm: MPI.Comm, array: np.ndarray, op: MPI.Op):
        self._comm, self._array, self._op = comm, array, op
        self._request = MPI.REQUEST_NULL

    def start(self, rows: int) -> None:
        self._request = self._comm.Iallreduce(MPI.IN_PLACE, self._array[:rows], op=self._op)

    def test(self) -> None:
        self._request.Test()

    def wait(self) -> None:
        self._request.Wait()

    def run(self, rows: int) -> None:
        self._comm.Allreduce(MPI.IN_PLACE, self._array[:rows], op=self._op)


class PairExchange(Exchange):
    """Between two ranks: each sends all of its rows in pieces, and joins what it gets with them.

    As many bytes as any algorithm sends, each way at once and without waiting in between. ``comm`` has two ranks and nothing else
    under way from rank to rank.
    """

    def __init__(self, comm: MPI.Comm, array: np.ndarray, op: MPI.Op):
        self._comm, self._other = comm, 1 - comm.rank
        self._own, self._row = array.reshape(-1), array[:1].size
        self._received = np.zeros_like(self._own)
        self._join = np.maximum if op == MPI.MAX else np.add
        self._piece = PIECE // array.itemsize
        self._pieces: list[MPI.Request] = []            # of whole pieces, a receive and a send each, made when first needed
        self._under_way: list[MPI.Request] = []
        self._count = 0

    def start(self, rows: int) -> None:
        self._count = count = rows * self._row
        whole = count // self._piece
        while len(self._pieces) < 2 * whole:
            self._add_piece(len(self._pieces) // 2)
        self._under_way = self._pieces[: 2 * whole]
        MPI.Prequest.Startall(self._under_way)
        if whole * self._piece < count:
            rest, tag = slice(whole * self._piece, count), _tag(whole)
            self._under_way += [self._comm.Irecv(self._received[rest], self._other, tag),
                                self._comm.Isend(self._own[rest], self._other, tag)]

    def _add_piece(self, number: int) -> None:
        part, tag = slice(number * self._piece, (number + 1) * self._piece), _tag(number)
        self._pieces += [self._comm.Recv_init(self._received[part], self._other, tag),
                         self._comm.Send_init(self._own[part], self._other, tag)]

    def test(self) -> None:
        MPI.Request.Testall(self._under_way)

    def wait(self) -> None:
        MPI.Request.Waitall(self._under_way)
        own = self._own[: self._count]
        self._join(own, self._received[: self._count], out=own)


def _tag(piece: int) -> int:
    """Of a piece. Requests are started in any order, so pieces of an exchange must not be taken for each other."""
    return _TAG + piece % _TAGS
