"""The loop of one replica: stages in a pipeline, micro-batches in flight, one leader that samples and decides."""

import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.outcomes import OutcomeBroadcast
from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.engine.answers import Answer, ReadyRequest, Sampler
from llama_hpc.engine.batching import MicroBatch
from llama_hpc.grid import Grid
from llama_hpc.model.faults import NONE, error_of
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results.schema import Output

NEXT, FINISHED, TOKENS, COUNTERS = 0, 1, 2, 3


@dataclass(frozen=True)
class BatchPlan:
    """How a replica batches: micro-batches in flight, slots of each, prefill tokens a sequence takes per step, rows per step."""

    micro_batches: int
    slots: int
    prefill_chunk: int
    max_rows: int

    @classmethod
    def of(cls, grid_data: int, stages: int, requests: int, max_seqs: int, prefill_chunk: int,
           micro_batches: int | None = None) -> "BatchPlan":
        """``max_seqs`` sequences a replica, but no more than its fair share of the requests, dealt to micro-batches.

        By default as many micro-batches as stages, so that every stage can work at any time.
        """
        sequences = min(max_seqs, -(-requests // grid_data))
        count = min(micro_batches or stages, sequences)
        slots = min(-(-sequences // count), max_seqs // count)
        return cls(count, slots, prefill_chunk, max(prefill_chunk, slots))

    @property
    def sequences(self) -> int:
        return self.micro_batches * self.slots


class Replica:
    """One rank's part in answering requests. ``run`` is collective over the replica; only the leader gets outputs.

    ``requests`` are all requests of the job, the same on every rank; which ones this replica answers the shared counter
    decides. ``decode`` turns ids into text (leader only; None without a tokenizer).
    """

    def __init__(self, grid: Grid, stage: TransformerStage, requests: list[ReadyRequest], plan: BatchPlan,
                 counters: SharedCounters, eos_ids: frozenset[int], decode, origin: float, tick=None):
        self.grid, self.stage, self.requests, self.counters = grid, stage, requests, counters
        self.eos_ids, self.decode, self.origin, self.tick = eos_ids, decode, origin, tick or (lambda: None)
        def prompt(index: int) -> np.ndarray:
            return requests[index].prompt
        self.micro_batches = [MicroBatch(m * plan.slots, plan.slots, prompt, plan.prefill_chunk, plan.max_rows)
                              for m in range(plan.micro_batches)]
        self.channel = StageChannel(grid.pipeline_comm, plan.micro_batches, plan.max_rows, stage.config.hidden_size)
        self.broadcast = OutcomeBroadcast(grid.replica, grid.leader_rank, plan.micro_batches, plan.slots)
        self.gather = LogitsGather(grid.tensor_comm, stage) if grid.last_stage else None
        self.sampler = Sampler(stage.config.vocab_size)
        self.answers: list[list[Answer | None]] = [[None] * plan.slots for _ in self.micro_batches]
        self.outputs: list[Output] = []
        self._exhausted = False

    def run(self) -> list[Output]:
        """Answers requests until none is left. Raises NumericsError on every rank of the replica at the same step."""
        running = list(range(len(self.micro_batches)))
        for m in running:
            self._decide_admissions(m)
            self.broadcast.post(m)
        while running:
            for m in list(running):
                if not self._turn(m):
                    running.remove(m)
        self.channel.finish()
        return self.outputs

    def _turn(self, m: int) -> bool:
        """One step of one micro-batch on this rank; False when it has nothing left to do."""
        micro_batch, outcome = self.micro_batches[m], self.broadcast.wait(m)
        if outcome.fault:
            raise self._fault(outcome.fault)
        micro_batch.apply(outcome)
        if not micro_batch.active:
            return False
        batch, slots = micro_batch.plan()
        stage = self.stage
        stage.faults.merge(self.channel.receive(m, stage.residual, batch.rows))
        stage.forward(batch)
        self.channel.send(m, stage.residual, batch.rows, stage.faults.code)
        if self.gather is not None:
            logits, fault = self.gather(len(slots))
            if self.grid.is_leader:
                self._decide(m, slots, logits, fault)
        stage.faults.clear()
        self.broadcast.post(m)
        self.tick()
        return True

    def _fault(self, code: int):
        # The leader ends the job: exchanges of other micro-batches, and other replicas, are still under way.
        error = error_of(code)
        error.reported_elsewhere = not self.grid.is_leader
        return error

    def _decide(self, m: int, slots: list[int], logits: np.ndarray, fault: int) -> None:
        """The leader's part: sample, end sequences, hand free slots to the next requests."""
        outcome = self.broadcast.outcomes[m]
        outcome.clear()
        outcome.fault = fault
        if fault:
            return
        for row, slot in enumerate(slots):
            answer = self.answers[m][slot]
            outcome.token[slot] = answer.extend(logits[row], self.sampler)
            if answer.finish_reason:
                outcome.done[slot] = 1
                self.outputs.append(answer.output(self.origin))
                self.answers[m][slot] = None
                self.counters.add(FINISHED, 1)
                self.counters.add(TOKENS, len(answer.tokens))
        self._admit(m)

    def _decide_admissions(self, m: int) -> None:
        if self.grid.is_leader:
            self.broadcast.outcomes[m].clear()
            self._admit(m)

    def _admit(self, m: int) -> None:
        outcome = self.broadcast.outcomes[m]
        for slot, answer in enumerate(self.answers[m]):
            if answer is not None or self._exhausted:
                continue
            index = self.counters.add(NEXT, 1)
            if index >= len(self.requests):
                self._exhausted = True
                continue
            outcome.admit[slot] = index
            self.answers[m][slot] = Answer(self.requests[index], self.eos_ids, self.decode, time.monotonic())


class LogitsGather:
    """Whole rows of logits, and the fault code, on tensor rank 0 of the last stage. Collective over its tensor group."""

    def __init__(self, comm: MPI.Comm, stage: TransformerStage):
        self.comm, self.stage = comm, stage
        self._fault = np.zeros(1, np.int64)
        rows, vocab_size = stage.logits.shape[0], stage.config.vocab_size
        self._ranges = comm.allgather(stage.share.vocabulary)
        root = comm.rank == 0 and comm.size > 1
        self._parts = np.zeros(rows * vocab_size if root else 0, np.float32)
        self._whole = np.zeros((rows, vocab_size) if root else (0, 0), np.float32)

    def __call__(self, rows: int) -> tuple[np.ndarray, int]:
        """(float32 [rows, vocab_size], fault code); on other ranks without meaning."""
        if self.comm.size == 1:
            return self.stage.logits[:rows], self.stage.faults.code
        self._fault[0] = self.stage.faults.code or NONE
        self.comm.Allreduce(MPI.IN_PLACE, self._fault, op=MPI.MIN)
        if rows:
            counts = [rows * len(r) for r in self._ranges]
            self.comm.Gatherv(self.stage.logits[:rows], (self._parts, counts) if self.comm.rank == 0 else None)
        if self.comm.rank == 0:
            start = 0
            for held in self._ranges:
                size = rows * len(held)
                self._whole[:rows, held.start : held.stop] = self._parts[start : start + size].reshape(rows, len(held))
                start += size
        return self._whole[:rows], int(self._fault[0]) % NONE
