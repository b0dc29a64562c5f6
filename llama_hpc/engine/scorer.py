"""A replica that scores: what its steps hold, and a leader that takes windows."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.outcomes import Outcome
from llama_hpc.engine.documents import ReadyDocument, Window
from llama_hpc.engine.loop import StepLoop
from llama_hpc.engine.packing import MOST_WINDOWS, Packer
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.queue import FINISHED, TOKENS, RequestQueue
from llama_hpc.grid import Grid
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.model.wanted import Wanted


@dataclass(frozen=True)
class ScorePlan:
    """Rows of a step at most, steps under way at once, pages of the KV cache."""

    budget: int
    depth: int
    pages: int


class Scorer(StepLoop):
    """One rank's part in scoring windows. Only the leader gets log-probabilities.

    ``documents`` and ``windows`` are those of the job, the same on every rank; ``queue`` tells the leader which windows are this
    replica's. No step waits for what another one finds: the ranks plan alike, from the windows that the leader has admitted.
    """

    def __init__(self, grid: Grid, stage: TransformerStage, documents: list[ReadyDocument], windows: list[Window],
                 plan: ScorePlan, queue: RequestQueue, counters: SharedCounters, origin: float, tick=None):
        pool = PagePool(plan.pages, sharing=False, parts=stage.cache.parts)
        super().__init__(grid, stage, pool, plan.depth, plan.budget, MOST_WINDOWS, origin, tick)
        self.windows, self.queue, self.counters = windows, queue, counters
        self.packer = Packer(documents, windows, plan.budget, self.pool, stage.cache.pages, stage.cache.first_parts)
        # By the number of a window, float32 of the tokens that it scores.
        self.logprobs: dict[int, np.ndarray] = {}
        self._most_ahead = plan.depth * plan.budget
        self._ahead = 0                     # rows that the leader has admitted and not run

    def work(self) -> dict[str, int | float | str]:
        """Also the windows scored, and the share of the time in which this rank waited for others."""
        return super().work() | {"windows": len(self.logprobs), "bubble": self.recorder.result().bubble}

    def plan(self) -> tuple[Batch, tuple[np.ndarray, list[tuple[int, slice]]]]:
        batch, *wanted = self.packer.plan()
        self._ahead -= batch.rows
        return batch, tuple(wanted)

    def apply(self, outcome: Outcome) -> None:
        for number in outcome.admitted:
            self.packer.admit(int(number))

    def want(self, planned: tuple[np.ndarray, list[tuple[int, slice]]]) -> Wanted:
        return Wanted(tokens=planned[0])

    def look(self, planned: tuple[np.ndarray, list[tuple[int, slice]]], wanted: Wanted
             ) -> tuple[np.ndarray, list[tuple[int, slice]]]:
        """Logits of the tokens whose log-probabilities are wanted, and whose these are."""
        targets, parts = planned
        return self.gather.chosen(targets), parts

    def decide(self, outcome: Outcome, fault: int, found: tuple[np.ndarray, list[tuple[int, slice]]] | None) -> None:
        """Admits windows for the steps until the next decision is known, or sees that all have run."""
        if found and not fault:
            self._note(*found)
        admitted = []
        while self._ahead < self._most_ahead and len(admitted) < MOST_WINDOWS:
            number = self.queue.take()
            if number is None:
                break
            admitted.append(number)
            self._ahead += self.windows[number].rows
        outcome.decide(fault, self.queue.exhausted and not self._ahead, (0, 0, 0, 0), admitted)

    def end(self, rows: int) -> tuple[int, ...]:
        return rows, rows, 0, self.packer.waiting, self.pool.used

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
