"""The loop of one replica: stages in a pipeline, several steps under way, one leader that samples and decides."""

import time
from dataclasses import astuple, dataclass

import numpy as np

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.outcomes import Outcomes
from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.engine.adapt import Adapter
from llama_hpc.engine.answers import Answer, ReadyRequest
from llama_hpc.engine.latency import Target
from llama_hpc.engine.logits import LogitsGather
from llama_hpc.engine.metrics import Recorder
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.pipeline import PipelineStage, PipelineState
from llama_hpc.engine.queue import FINISHED, TOKENS, RequestQueue
from llama_hpc.engine.scheduler import Scheduler, Sequence, StepLimits
from llama_hpc.grid import Grid
from llama_hpc.model.faults import error_of
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results.schema import Output

_NAP = 0.005                    # seconds between looks for requests


@dataclass(frozen=True)
class BatchPlan:
    """How a replica batches: sequences at a time, steps under way at once, what a step may hold."""

    max_seqs: int
    depth: int
    limits: StepLimits
    pages: int                  # of the KV cache
    sharing: bool = True        # of equal beginnings
    adapt: bool = False         # whether the limits follow what is measured
    targets: tuple[Target, ...] = ()


class Replica:
    """One rank's part in answering requests. ``run`` is collective over the replica; only the leader gets outputs.

    ``requests`` are all requests of the job, the same on every rank; ``queue`` tells the leader which ones are this replica's.
    ``decode`` turns ids into text (leader only; None without a tokenizer). Times are seconds after ``origin``.
    """

    def __init__(self, grid: Grid, stage: TransformerStage, requests: list[ReadyRequest], plan: BatchPlan, queue: RequestQueue,
                 counters: SharedCounters, eos_ids: frozenset[int], decode, origin: float, tick=None):
        self.grid, self.stage, self.requests, self.queue, self.counters = grid, stage, requests, queue, counters
        self.eos_ids, self.decode, self.origin, self.tick = eos_ids, decode, origin, tick or (lambda: None)
        self.plan = plan
        self.scheduler = Scheduler(plan.limits, plan.max_seqs, PagePool(plan.pages, plan.sharing), stage.cache.pages, plan.depth,
                                   self._sequences)
        self.channel = StageChannel(grid.pipeline_comm, plan.depth, plan.limits.token_budget, stage.config.hidden_size)
        self.pipeline, self.under_way = PipelineStage(stage, self.channel), PipelineState(grid.shape.pipeline, plan.depth)
        self.outcomes = Outcomes(grid.replica, grid.leader_rank, plan.depth, plan.max_seqs)
        self.gather = LogitsGather(grid.tensor_comm, stage) if grid.last_stage else None
        self.answers: dict[tuple[int, int], Answer] = {}        # by request and sample
        self._samples_left: dict[int, int] = {}                 # of each request that is being answered
        self.outputs: list[Output] = []
        self._steps = self._tokens = 0
        # Only the leader's limits count; on the last stage, what it waits for is the stages before.
        self.adapter = Adapter(plan.limits, plan.max_seqs, plan.targets, plan.depth) if plan.adapt else None
        self.recorder = Recorder(origin, stage.reducer.nanoseconds)

    def _sequences(self, number: int) -> list[Sequence]:
        request = self.requests[number]
        return [Sequence(number, sample, request.prompt, request.limit) for sample in range(request.params.n)]

    def run(self) -> list[Output]:
        """Answers requests until none is left. Raises NumericsError on every rank of the replica at the same step."""
        self._decide(0, [], 0)
        self.outcomes.post(0)
        self.scheduler.apply(self.outcomes.wait(0))
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
        while len(self.under_way):
            self.outcomes.wait(self._oldest())
        self.outcomes.free()
        self.channel.finish()
        return self.outputs

    def work(self) -> dict[str, int | float | str]:
        """What this rank has done: counts of steps and tokens run, of tokens found in the cache and not run, of sequences set
        back; the most pages that sequences held at a time; bytes sent to the next stage; what ``TensorReducer.work`` tells."""
        pool = self.scheduler.pool
        return {"steps": self._steps, "sequence_parallel_steps": self.stage.spread_steps,
                "overlapped_steps": self.stage.overlapped_steps, "tokens": self._tokens, "shared_tokens": pool.shared_tokens,
                "setbacks": self.scheduler.setbacks, "pages": pool.count, "pages_used": pool.most_used,
                "bytes_sent": self.channel.bytes_sent, **self.stage.reducer.work()}

    def _oldest(self) -> int:
        """The oldest step under way, taken off when it has passed all stages."""
        while not self.under_way.has_output():
            self.under_way.advance()
        return self.under_way.pop()

    def _learn(self, step: int) -> bool:
        """Takes over the leader's decisions about a step; whether it was the last one."""
        outcome = self.outcomes.wait(step)
        if outcome.fault:
            raise self._fault(outcome.fault)
        self.scheduler.apply(outcome)
        return outcome.last

    def _step(self, step: int) -> None:
        """Plans a step and runs this rank's part of it."""
        batch, chosen = self.scheduler.plan()
        if not self.outcomes.leads:
            self.outcomes.post(step)
        stage, lap = self.stage, self.recorder.lap
        lap("schedule")
        if batch.rows:
            self._steps += 1
            self._tokens += batch.rows
            self.pipeline.run(batch, lap)
        if self.gather is not None:
            fault = self.gather.fault() if batch.rows else 0
            wanted = [i for i, sequence in enumerate(chosen) if self._needs_logits(sequence)]
            rows = self.gather.rows(wanted)
            lap("gather")
            if self.outcomes.leads:
                self._decide(step, chosen, fault, dict(zip(wanted, rows, strict=True)))
                self.outcomes.post(step)
                lap("decide")
        stage.faults.clear()
        self.tick()
        if self.adapter and batch.rows:
            self.adapter.observe(*self.recorder.step_seconds())
        scheduler = self.scheduler
        self.recorder.end((batch.rows, scheduler.prefilled, len(scheduler.running), len(scheduler.waiting), scheduler.pool.used))

    def _needs_logits(self, sequence: Sequence) -> bool:
        """Whether the token that a sequence waits for takes its row of logits; all ranks see the same state of it."""
        request = self.requests[sequence.request]
        return request.params.needs_logits(sequence.known - len(request.prompt))

    def _fault(self, code: int):
        # The leader ends the job: exchanges of other steps, and other replicas, are still under way.
        error = error_of(code)
        error.reported_elsewhere = not self.grid.is_leader
        return error

    def _decide(self, step: int, chosen: list[Sequence], fault: int, rows: dict[int, np.ndarray] | None = None) -> None:
        """The leader's part: choose tokens, end sequences, admit requests. ``rows``: logits of the outputs that need them."""
        if not self.outcomes.leads:
            return
        outcome = self.outcomes.of(step)
        if chosen and not fault:
            found = zip(chosen, *self.gather.likeliest(len(chosen)), strict=True)
            for i, (sequence, token, maximum, total) in enumerate(found):
                answer = self.answers[sequence.request, sequence.sample]
                outcome.token[i] = answer.extend(int(token), maximum, int(total), rows.get(i))
                outcome.done[i] = bool(answer.finish_reason)
                if answer.finish_reason:
                    self._finish(sequence, answer)
        if not self.answers and self.queue.next_arrival is not None:
            self._wait_for_arrival(self.queue.next_arrival)
        admitted = self._admit()
        limits = self.adapter.limits if self.adapter else self.plan.limits
        outcome.decide(fault, self.queue.exhausted and not self.answers, astuple(limits), admitted)

    def _wait_for_arrival(self, arrival: float) -> None:
        """With nothing to do until a request arrives, or for a while."""
        self.recorder.lap("decide")
        time.sleep(min(max(0.0, arrival - (time.monotonic() - self.origin)), _NAP))
        self.recorder.lap("idle")

    def _finish(self, sequence: Sequence, answer: Answer) -> None:
        self.outputs.append(answer.output(self.origin, sequence.setbacks))
        del self.answers[sequence.request, sequence.sample]
        self.counters.add(TOKENS, len(answer.tokens))
        self._samples_left[sequence.request] -= 1
        if not self._samples_left[sequence.request]:
            del self._samples_left[sequence.request]
            self.counters.add(FINISHED, 1)

    def _admit(self) -> list[int]:
        """Requests while a place is free. Samples of the last one for which there is none wait in the scheduler."""
        admitted = []
        while len(self.answers) < self.plan.max_seqs and (number := self.queue.take(time.monotonic() - self.origin)) is not None:
            request = self.requests[number]
            self._samples_left[number] = request.params.n
            for sample in range(request.params.n):
                self.answers[number, sample] = Answer(request, sample, self.eos_ids, self.decode, time.monotonic())
            admitted.append(number)
        return admitted
