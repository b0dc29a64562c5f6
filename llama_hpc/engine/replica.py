"""A replica that answers requests: what its steps hold, and a leader that samples and admits."""

import time
from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.outcomes import Outcome
from llama_hpc.engine.adapt import Adapter
from llama_hpc.engine.answers import Answer, ReadyRequest
from llama_hpc.engine.latency import Target
from llama_hpc.engine.loop import StepLoop
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.prepare import longest
from llama_hpc.engine.pressure import Pressure
from llama_hpc.engine.queue import FINISHED, STOP, TOKENS, RequestQueue, missing
from llama_hpc.engine.scheduler import Scheduler, Sequence, StepLimits
from llama_hpc.grid import Grid
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.model.wanted import Wanted
from llama_hpc.results.schema import Output
from llama_hpc.runtime.stopping import Stop

_NAP = 0.005                    # seconds between looks for requests
_LOOK = 0.1                     # seconds between looks for a wish to stop on other ranks
_SAMPLE = 1.0                   # seconds between looks at memory, and reports of what was generated


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


class Replica(StepLoop):
    """One rank's part in answering requests. Only the leader gets outputs.

    ``requests`` are all requests of the job, the same on every rank; ``queue`` tells the leader which ones are this replica's.
    ``decode`` turns ids into text (leader only; None without a tokenizer). Times are seconds after ``origin``. ``keep`` takes
    each finished answer on the leader (default: ``outputs`` does); pairs of request and sample that are ``done`` are left out.
    With a reason to ``stop`` on any rank of the job, ``run`` ends at the next step and gives up what is unfinished. When the
    leader finds that ranks of the job are ``gone``, all ranks call ``regroup(self)`` behind the same step. ``taken`` gets the
    requests that the leader admits. ``number`` is that of the replica in the job.
    """

    def __init__(self, grid: Grid, stage: TransformerStage, requests: list[ReadyRequest], plan: BatchPlan, queue: RequestQueue,
                 counters: SharedCounters, eos_ids: frozenset[int], decode, origin: float, tick=None,
                 keep=None, done: frozenset[tuple[int, int]] = frozenset(), stop: Stop | None = None,
                 taken: set[int] | None = None, gone=None, regroup=None, number: int = 0):
        super().__init__(grid, stage, PagePool(plan.pages, plan.sharing, stage.cache.parts), plan.depth, plan.limits.token_budget,
                         plan.max_seqs, origin, tick)
        self.requests, self.queue, self.counters, self.eos_ids, self.decode = requests, queue, counters, eos_ids, decode
        self.limits, self.max_seqs = plan.limits, plan.max_seqs
        self.scheduler = Scheduler(plan.limits, plan.max_seqs, self.pool, stage.cache.pages, plan.depth, self._sequences,
                                   stage.cache.first_parts)
        self.answers: dict[tuple[int, int], Answer] = {}        # by request and sample
        self._samples_left: dict[int, int] = {}                 # of each request that is being answered
        self.outputs: list[Output] = []
        self._keep, self._done, self.finished = keep or self.outputs.append, done, 0
        self._stop, self._stopping, self._looked = stop, False, 0.0
        self._gone, self._regroup, self._pausing = gone, regroup, False
        self._taken = set() if taken is None else taken
        self.pressure = Pressure(counters, number, self.pool, stage, longest(requests))
        # Tokens that were generated, those of finished answers, and those that the shared counter knows of.
        self._generated, self._delivered, self._told, self._sampled = 0, 0, 0, 0.0
        # Only the leader's limits count; on the last stage, what it waits for is the stages before.
        self.adapter = Adapter(plan.limits, plan.max_seqs, plan.targets, plan.depth) if plan.adapt else None

    def _sequences(self, number: int) -> list[Sequence]:
        request = self.requests[number]
        return [Sequence(number, sample, request.prompt, request.limit) for sample in missing(request, number, self._done)]

    def work(self) -> dict[str, int | float | str]:
        """Also tokens that were found in the cache and not run, sequences that were set back, and how often the cache shrank."""
        return super().work() | {"shared_tokens": self.pool.shared_tokens, "setbacks": self.scheduler.setbacks,
                                 "pressure": self.pressure.events}

    def run(self) -> None:
        super().run()
        self._tell(self._delivered)

    def plan(self) -> tuple[Batch, list[Sequence]]:
        return self.scheduler.plan()

    def apply(self, outcome: Outcome) -> None:
        self.scheduler.apply(outcome)
        self.pressure.follow(self.scheduler.limits.pages)
        if outcome.pause:
            self._regroup(self)
            self._pausing = False
            self.recorder.lap("idle")

    def go_on(self, queue: RequestQueue, counters: SharedCounters, done: frozenset[tuple[int, int]], tick) -> None:
        """In ``regroup``: with other requests from now on, beside those that are being answered."""
        self.queue, self.counters, self._done, self.tick = queue, counters, done, tick or (lambda: None)
        self.pressure.counters = counters

    @property
    def unfinished(self) -> list[int]:
        """Leader: the requests that it is answering."""
        return list(self._samples_left)

    def want(self, planned: list[Sequence]) -> Wanted:
        """Rows of logits where the host chooses; where a device does, what it chooses by."""
        rows = [i for i, sequence in enumerate(planned) if self._needs_logits(sequence)]
        if self.stage.draws is None:
            return Wanted(rows)
        by_host = [i for i in rows if self.requests[planned[i].request].params.logprobs]
        return Wanted(by_host, [self.answers[planned[i].request, planned[i].sample].draw(i) for i in rows if i not in by_host])

    def look(self, planned: list[Sequence], wanted: Wanted
             ) -> tuple[list[Sequence], dict[int, tuple[int, np.float32]], dict[int, np.ndarray]]:
        """The sequences, by place the token and log-probability that a device has chosen, and whole rows of logits where the host
        chooses."""
        places = [draw.row for draw in wanted.draws]
        drawn = dict(zip(places, zip(*self.stage.drawn(len(places)), strict=True), strict=True)) if places else {}
        # Rows come to tensor rank 0 only.
        return planned, drawn, dict(zip(wanted.rows, self.gather.rows(wanted.rows), strict=False))

    def _needs_logits(self, sequence: Sequence) -> bool:
        """Whether the token that a sequence waits for takes its row of logits; all ranks see the same state of it."""
        request = self.requests[sequence.request]
        return request.params.needs_logits(sequence.known - len(request.prompt))

    def decide(self, outcome: Outcome, fault: int, found: tuple[list[Sequence], dict, dict] | None) -> None:
        """Chooses tokens, ends sequences, admits requests."""
        if found and not fault:
            chosen, drawn, rows = found
            self._generated += len(chosen)
            likeliest = zip(chosen, *self.gather.likeliest(len(chosen)), strict=True)
            for i, (sequence, token, maximum, total) in enumerate(likeliest):
                answer = self.answers[sequence.request, sequence.sample]
                outcome.token[i] = (answer.take(int(drawn[i][0]), drawn[i][1]) if i in drawn
                                    else answer.extend(int(token), maximum, int(total), rows.get(i)))
                outcome.done[i] = bool(answer.finish_reason)
                if answer.finish_reason:
                    self._finish(sequence, answer)
        stopping, pause = self._must_stop(), self._must_pause()
        if not self.answers and not stopping and self.queue.next_arrival is not None:
            self._wait_for_arrival(self.queue.next_arrival)
        # While it waits for its own word to pause to come back, the queue may be about to change.
        admitted = [] if stopping or self._pausing else self._admit()
        limits = self.adapter.limits if self.adapter else self.limits
        last = not self._pausing and (stopping or (self.queue.exhausted and not self.answers))
        limits = limits.token_budget, limits.prefill, limits.decode, self.pressure.pages
        outcome.decide(fault, last, limits, admitted, pause)

    def _must_stop(self) -> bool:
        """Whether some rank has a reason to stop; all are told of this one's."""
        if self._stopping:
            return True
        if self._stop and self._stop.reason:
            self._stopping = True
            self.counters.add(STOP, 1)
        elif self.outcomes.leads and self.counters.comm.size > 1 and time.monotonic() - self._looked > _LOOK:
            self._looked, self._stopping = time.monotonic(), self.counters.read(STOP) > 0
        return self._stopping

    def _must_pause(self) -> bool:
        """Whether ranks of the job are gone, the first time that it is noticed."""
        if self._gone is None or self._pausing or not self._gone():
            return False
        self._pausing = True
        return True

    def end(self, rows: int) -> tuple[int, ...]:
        if not self.outcomes.leads:
            self._must_stop()
        if self.adapter and rows:
            self.adapter.observe(*self.recorder.step_seconds())
        if time.monotonic() - self._sampled > _SAMPLE:
            self._sample()
        scheduler = self.scheduler
        return rows, scheduler.prefilled, len(scheduler.running), len(scheduler.waiting), self.pool.used

    def _sample(self) -> None:
        self._sampled = time.monotonic()
        self.pressure.look()
        if self.outcomes.leads:
            self.pressure.decide()
            self._tell(self._generated)

    def _tell(self, tokens: int) -> None:
        """Brings the shared counter of tokens up to date."""
        if tokens != self._told:
            self.counters.add(TOKENS, tokens - self._told)
            self._told = tokens

    def _wait_for_arrival(self, arrival: float) -> None:
        """With nothing to do until a request arrives, or for a while."""
        self.recorder.lap("decide")
        time.sleep(min(max(0.0, arrival - (time.monotonic() - self.origin)), _NAP))
        self.recorder.lap("idle")

    def _finish(self, sequence: Sequence, answer: Answer) -> None:
        self._keep(answer.output(self.origin, sequence.setbacks))
        self.finished += 1
        del self.answers[sequence.request, sequence.sample]
        self._delivered += len(answer.tokens)
        self._samples_left[sequence.request] -= 1
        if not self._samples_left[sequence.request]:
            del self._samples_left[sequence.request]
            self.counters.add(FINISHED, 1)

    def _admit(self) -> list[int]:
        """Requests while a place is free. Samples of the last one for which there is none wait in the scheduler."""
        admitted = []
        while len(self.answers) < self.max_seqs and (number := self.queue.take(time.monotonic() - self.origin)) is not None:
            request = self.requests[number]
            samples = missing(request, number, self._done)
            self._samples_left[number] = len(samples)
            for sample in samples:
                self.answers[number, sample] = Answer(request, sample, self.eos_ids, self.decode, time.monotonic())
            admitted.append(number)
        self._taken.update(admitted)
        return admitted
