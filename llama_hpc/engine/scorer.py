"""The loop of one replica that scores: stages in a pipeline, several steps under way, one leader that takes windows."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.outcomes import Outcomes
from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.engine.documents import ReadyDocument, Window
from llama_hpc.engine.logits import LogitsGather
from llama_hpc.engine.packing import MOST_WINDOWS, Packer
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.queue import FINISHED, TOKENS, RequestQueue
from llama_hpc.grid import Grid
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.model.faults import error_of
from llama_hpc.model.transformer import TransformerStage


@dataclass(frozen=True)
class ScorePlan:
    """Rows of a step at most, steps under way at once, pages of the KV cache."""

    budget: int
    depth: int
    pages: int


class Scorer:
    """One rank's part in scoring windows. ``run`` is collective over the replica; only the leader gets log-probabilities.

    ``documents`` and ``windows`` are those of the job, the same on every rank; ``queue`` tells the leader which windows are this
    replica's. No step waits for what another one finds: the ranks plan alike, from the windows that the leader has admitted.
    """

    def __init__(self, grid: Grid, stage: TransformerStage, documents: list[ReadyDocument], windows: list[Window],
                 plan: ScorePlan, queue: RequestQueue, counters: SharedCounters, tick=None):
        self.grid, self.stage, self.windows, self.plan = grid, stage, windows, plan
        self.queue, self.counters, self.tick = queue, counters, tick or (lambda: None)
        self.pool = PagePool(plan.pages, sharing=False, parts=stage.cache.parts)
        self.packer = Packer(documents, windows, plan.budget, self.pool, stage.cache.pages, stage.cache.first_parts)
        self.channel = StageChannel(grid.pipeline_comm, plan.depth, plan.budget, stage.config.hidden_size)
        self.outcomes = Outcomes(grid.replica, grid.leader_rank, plan.depth, MOST_WINDOWS)
        self.gather = LogitsGather(grid.tensor_comm, stage) if grid.last_stage else None
        self.logprobs: dict[int, np.ndarray] = {}
        self._ahead = 0                     # rows that the leader has admitted and not run
        self._steps = self._tokens = 0

    def run(self) -> dict[int, np.ndarray]:
        """What this replica has scored: by the number of a window, the log-probabilities float32 of the tokens that it scores.

        Raises NumericsError on every rank of the replica at the same step.
        """
        self._decide(0, 0)
        self.outcomes.post(0)
        last, step, depth = self._learn(0), 1, self.plan.depth
        while not last:
            if step > depth:
                last = self._learn(step - depth)
            if not last:
                self._step(step)
                step += 1
        for under_way in range(max(1, step - depth + 1), step):
            self.outcomes.wait(under_way)
        self.outcomes.free()
        self.channel.finish()
        return self.logprobs

    def work(self) -> dict[str, int]:
        """What this rank has done: counts of steps, tokens run and windows scored, pages, and the bytes sent to other stages."""
        return {"steps": self._steps, "tokens": self._tokens, "windows": len(self.logprobs), "pages": self.pool.count,
                "pages_used": self.pool.most_used, "bytes_sent": self.channel.bytes_sent}

    def _learn(self, step: int) -> bool:
        """Takes over the leader's decisions about a step; whether it was the last one."""
        outcome = self.outcomes.wait(step)
        if outcome.fault:
            # The leader ends the job: exchanges of other steps, and other replicas, are still under way.
            error = error_of(outcome.fault)
            error.reported_elsewhere = not self.grid.is_leader
            raise error
        for number in outcome.admitted:
            self.packer.admit(int(number))
        return outcome.last

    def _step(self, step: int) -> None:
        """Plans a step and runs this rank's part of it."""
        batch, targets, parts = self.packer.plan()
        if not self.outcomes.leads:
            self.outcomes.post(step)
        stage, fault = self.stage, 0
        if batch.rows:
            self._steps += 1
            self._tokens += batch.rows
            self._ahead -= batch.rows
            stage.faults.merge(self.channel.receive(stage.residual, batch.rows))
            stage.forward(batch)
            self.channel.send(stage.residual, batch.rows, stage.faults.code)
            if self.gather is not None:
                fault = self.gather.fault()
                logits = self.gather.chosen(targets)
                if self.outcomes.leads and not fault:
                    self._note(logits, parts)
        if self.outcomes.leads:
            self._decide(step, fault)
            self.outcomes.post(step)
        stage.faults.clear()
        self.tick()

    def _note(self, logits: np.ndarray, parts: list[tuple[int, slice]]) -> None:
        """The leader's part of a step: log-probabilities from the logits of the wanted tokens."""
        _, maxima, totals = self.gather.likeliest(len(logits))
        found = [log_probability(*row) for row in zip(logits.tolist(), maxima.tolist(), totals.tolist(), strict=True)]
        self.counters.add(TOKENS, len(found))
        start, finished = 0, 0
        for number, place in parts:
            size = self.windows[number].scored
            count = place.stop - place.start
            self.logprobs.setdefault(number, np.zeros(size, np.float32))[place] = found[start : start + count]
            start += count
            finished += place.stop == size
        self.counters.add(FINISHED, finished)

    def _decide(self, step: int, fault: int) -> None:
        """The leader's part: admits windows for the steps until the next decision is known, or sees that all have run."""
        if not self.outcomes.leads:
            return
        admitted = []
        while self._ahead < self.plan.depth * self.plan.budget and len(admitted) < MOST_WINDOWS:
            number = self.queue.take()
            if number is None:
                break
            admitted.append(number)
            self._ahead += self.windows[number].rows
        self.outcomes.of(step).decide(fault, self.queue.exhausted and not self._ahead, (0, 0, 0), admitted)
