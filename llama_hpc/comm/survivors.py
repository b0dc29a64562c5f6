"""The ranks of a job that are alive: noticing that one is gone, waking who waits, and a communicator without it.

By User-Level Failure Mitigation (Bland et al. 2013; MPI 5.0 chapter on process failures), which Open MPI 5 has under
``mpirun --with-ft ulfm``. An exchange with a dead rank fails on whoever waits for it; who waits for a rank that has noticed and
left is woken by revoking what they share.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from mpi4py import MPI

from llama_hpc.errors import LlamaHpcError, RankLost
from llama_hpc.runtime.topology import hostname

FAILURES = (RankLost, MPI.Exception)            # what the loss of a rank raises
_PAUSES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)       # seconds before attempts to go on
_NAP = 0.01                     # seconds between looks at what a rank with nothing to do waits for


def failed(comm: MPI.Comm) -> bool:
    """Whether a rank of ``comm`` is gone, or another one has left it because of that. Not collective; takes a microsecond."""
    try:
        # Lets the library notice.
        comm.Iprobe()
        return comm.Is_revoked() or comm.Get_failed().size > 0
    except MPI.Exception:
        return True


class Member(NamedTuple):
    """A rank of the world, where it runs, and as which process."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process})"


class Survivors:
    """``comm`` holds the ranks that are alive as far as is known, in the order of the world; ``members`` names them.

    Making one, ``introduce``, ``persist`` and ``meet`` are collective over them. ``lost`` are the ranks that are gone, ``shrunk``
    counts how often others went on without some.
    """

    def __init__(self, comm: MPI.Comm):
        self.comm = comm.Dup()
        self._own = Member(MPI.COMM_WORLD.rank, hostname(), os.getpid())
        self.members: list[Member] = comm.allgather(self._own)
        self.lost: list[Member] = []
        self.shrunk = 0

    def failed(self) -> bool:
        """Whether a rank is gone; see the function."""
        return failed(self.comm)

    def leave(self, communicators: Iterable[MPI.Comm] = ()) -> None:
        """Wakes all who wait for this rank, which gives up what it does in ``comm`` and these communicators."""
        for comm in (self.comm, *communicators):
            with suppress(MPI.Exception):
                comm.Revoke()

    def introduce(self) -> list[Member]:
        """Brings ``members`` up to date; returns those that were lost since the last time. Raises MPI.Exception."""
        alive = self.comm.allgather(self._own)
        gone = [member for member in self.members if member not in alive]
        self.members, self.lost = alive, self.lost + gone
        return gone

    def persist(self, function: Callable[[], Any], lost: bool = False) -> Any:
        """``function()``, again with those who are left until no rank is lost in it; ``lost``: one has been already.

        Collective over the ranks alive, as the function is over ``comm``. Raises LlamaHpcError when that does not come to an end.
        """
        for pause in _PAUSES:
            if lost:
                time.sleep(pause)
                self.comm = self.comm.Shrink()
                self.shrunk += 1
            result, lost = None, True
            try:
                result = function()
            except FAILURES:
                self.leave()
            if self._agree(result is not None):
                return result
        raise LlamaHpcError(f"ranks were lost, and those left could not go on in {len(_PAUSES)} attempts: --resume goes on")

    def _agree(self, well: bool) -> bool:
        """Whether all are well and alive; the same on all of them."""
        try:
            return bool(self.comm.Agree(int(well)))
        except MPI.Exception:
            return False

    def meet(self, tick: Callable[[], None] | None = None) -> None:
        """Returns when all are here; who waits takes no core, and calls ``tick``. Raises RankLost or MPI.Exception."""
        request = self.comm.Ibarrier()
        while not request.Test():
            if tick:
                tick()
            if self.failed():
                raise RankLost("a rank of this job is gone")
            time.sleep(_NAP)

