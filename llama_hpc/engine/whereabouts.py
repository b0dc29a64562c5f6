"""Where a rank is in its steps, for its watchdog."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

if TYPE_CHECKING:
    from llama_hpc.engine.loop import StepLoop


class Whereabouts:
    """Of a ``StepLoop``; ``ranks`` of the world are those of its replica. Reads what the loop and compiled code keep anyway."""

    def __init__(self, loop: "StepLoop"):
        self._recorder, self._stage, grid = loop.recorder, loop.stage, loop.grid
        replica = grid.replica.Get_group()
        self.ranks = tuple(replica.Translate_ranks(range(replica.size), MPI.COMM_WORLD.Get_group()))
        self._leader = self.ranks[grid.leader_rank]
        self._leads = grid.is_leader
        self._before = self.ranks[grid.replica.rank - grid.shape.tensor] if grid.stage else None

    def mark(self) -> Hashable:
        """Changes with every phase of a step, and every operation."""
        return self._recorder.mark(), self._stage.mark()

    def state(self) -> dict[str, Any]:
        """``step`` and ``what``: the phase (see ``metrics.PHASES``), whom it waits for or which operation it came to last."""
        step, phase = self._recorder.now()
        more = {"outcome": " to all" if self._leads else f" of rank {self._leader}", "receive": f" from rank {self._before}",
                "compute": f", {self._stage.reached()}"}
        return {"step": step, "what": phase + more.get(phase, "")}
