"""The loop of one replica: stages in a pipeline, several steps under way, one leader that decides."""

import os
from collections import deque
from functools import partial
from typing import Any, NamedTuple

from mpi4py import MPI

from llama_hpc.comm.outcomes import Outcome, Outcomes
from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.engine.logits import LogitsGather
from llama_hpc.engine.metrics import WAITING, Recorder
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.pipeline import PipelineStage, PipelineState
from llama_hpc.engine.whereabouts import Whereabouts
from llama_hpc.grid import Grid
from llama_hpc.model.faults import error_of
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.model.wanted import NOTHING, Wanted
from llama_hpc.runtime.activity import doing


class _Begun(NamedTuple):
    """A step that has begun: its number, its rows, what was planned and what is wanted of it."""

    step: int
    rows: int
    planned: Any
    wanted: Wanted


class StepLoop:
    """One rank's part in the steps of a replica; whoever inherits it says what a step holds and what comes of it.

    Making and ``run`` are collective over the replica. ``depth`` steps are under way at most, of up to ``max_rows`` rows; the
    leader decides about up to ``max_seqs`` outputs and admissions of each. ``pool`` has the pages of the cache. ``origin``:
    time.monotonic() of second 0; ``tick`` is called after every step.
    """

    def __init__(self, grid: Grid, stage: TransformerStage, pool: PagePool, depth: int, max_rows: int, max_seqs: int,
                 origin: float, tick=None):
        self.grid, self.stage, self.pool, self.origin, self.tick = grid, stage, pool, origin, tick or (lambda: None)
        self.channel = StageChannel(grid.pipeline_comm, depth, max_rows, stage.config.hidden_size)
        self.pipeline, self.under_way = PipelineStage(stage, self.channel), PipelineState(grid.shape.pipeline, depth)
        self.outcomes = Outcomes(grid.replica, grid.leader_rank, depth, max_seqs)
        self.gather = LogitsGather(grid.tensor_comm, stage) if grid.last_stage else None
        self.recorder = Recorder(origin, stage.joining)
        self._steps = self._tokens = 0
        # Steps that have begun. While a device computes one, the host finishes the one before and goes on to the next.
        self._begun: deque[_Begun] = deque()
        self._beside = 1 if stage.overlaps and depth > 1 else 0
        self._meanwhile = {phase: partial(self._end_what_is_over, phase) if self._beside else None for phase in WAITING}

    def plan(self) -> tuple[Batch, Any]:
        """The next step, perhaps an empty one, and what ``look`` is to know of it; alike on all ranks."""
        raise NotImplementedError

    def want(self, planned: Any) -> Wanted:
        """What ``look`` will need of the logits of a step that has rows; on the last stage."""
        raise NotImplementedError

    def look(self, planned: Any, wanted: Wanted) -> Any:
        """What the leader needs of the logits of a step that had rows. Collective over the tensor group of the last stage."""
        raise NotImplementedError

    def decide(self, outcome: Outcome, fault: int, found: Any) -> None:
        """The leader's part of a step; ``found`` by ``look``, None where nothing ran."""
        raise NotImplementedError

    def apply(self, outcome: Outcome) -> None:
        """Takes over the leader's decisions about the oldest step under way (before the first step: about none)."""
        raise NotImplementedError

    def end(self, rows: int) -> tuple[int, ...]:
        """A step of so many rows is over; returns what it held, as in ``metrics.COUNTS``."""
        raise NotImplementedError

    def run(self) -> None:
        """Steps until the leader says that one was the last. Raises NumericsError on every rank of the replica at the same
        step."""
        where = Whereabouts(self)
        with doing("steps", where.ranks, where):
            self._run()

    def _run(self) -> None:
        if self.outcomes.leads:
            self.decide(self.outcomes.of(0), 0, None)
        self.outcomes.post(0)
        self.apply(self.outcomes.wait(0))
        last, step = False, 1
        while not last:
            self.recorder.begin()
            if not self.under_way.can_accept():
                last = self._learn(self._oldest())
                self.recorder.lap("outcome")
            if not last:
                self.under_way.push(step)
                self._step(step)
                self.under_way.advance()
                step += 1
        self._end_steps()
        while len(self.under_way):
            self.outcomes.wait(self._oldest())
        self.outcomes.free()
        self.channel.finish()

    @property
    def communicators(self) -> list[MPI.Comm]:
        """Those of its own, in which ranks of the replica wait for each other."""
        return [self.channel.comm, self.outcomes.comm]

    def work(self) -> dict[str, int | float | str]:
        """What this rank has done: counts of steps and tokens run; pages, and the most of them that were held at a time; bytes
        sent to the next stage; what ``TransformerStage.work`` tells."""
        return {"steps": self._steps, "sequence_parallel_steps": self.stage.spread_steps,
                "overlapped_steps": self.stage.overlapped_steps, "tokens": self._tokens,
                "pages": self.pool.count, "pages_used": self.pool.most_used, "bytes_sent": self.channel.bytes_sent,
                **self.stage.work()}

    def _oldest(self) -> int:
        """The oldest step under way, taken off when it has passed all stages."""
        while not self.under_way.has_output():
            self.under_way.advance()
        return self.under_way.pop()

    def _learn(self, step: int) -> bool:
        """Takes over the leader's decisions about a step; whether it was the last one."""
        while self._begun and self._begun[0].step <= step:
            self._end_oldest()
        outcome = self.outcomes.wait(step, self._meanwhile["outcome"])
        if outcome.fault:
            # The leader ends the job: exchanges of other steps, and other replicas, are still under way.
            error = error_of(outcome.fault)
            error.reported_elsewhere = not self.grid.is_leader
            raise error
        if outcome.pause:
            self._end_steps()
        self.apply(outcome)
        return outcome.last

    def _step(self, step: int) -> None:
        """Plans a step and runs this rank's part of it."""
        batch, planned = self.plan()
        if not self.outcomes.leads:
            self.outcomes.post(step)
        lap, wanted = self.recorder.lap, NOTHING
        lap("schedule")
        if batch.rows:
            self._steps += 1
            self._tokens += batch.rows
            if self.gather is not None:
                wanted = self.want(planned)
            self.pipeline.begin(batch, wanted, lap, self._meanwhile["receive"])
        self._begun.append(_Begun(step, batch.rows, planned, wanted))
        self._end_steps(self._beside if batch.rows else 0)
        self.tick()
        self.recorder.end(self.end(batch.rows))

    def _end_steps(self, ahead: int = 0) -> None:
        """Finishes the steps that have begun, but for the ``ahead`` youngest."""
        while len(self._begun) > ahead:
            self._end_oldest()

    def _end_what_is_over(self, phase: str) -> None:
        """In a ``phase`` in which this rank waits for others: finishes a step that the device has computed."""
        if self._begun and self.stage.over():
            self.recorder.lap(phase)
            self._end_oldest()
        else:
            os.sched_yield()

    def _end_oldest(self) -> None:
        """Sends the oldest step that has begun to the next stage, or tells its outcome."""
        step, rows, planned, wanted = self._begun.popleft()
        lap = self.recorder.lap
        if rows:
            self.pipeline.finish(lap)
        if self.gather is not None:
            fault, found = (self.gather.fault(), self.look(planned, wanted)) if rows else (0, None)
            lap("gather")
            if self.outcomes.leads:
                self.decide(self.outcomes.of(step), fault, found)
                self.outcomes.post(step)
                lap("decide")
        self.stage.faults.clear()
