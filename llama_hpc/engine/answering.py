"""Answering requests with a loaded model: the plan for them, and the replicas at work."""

from dataclasses import dataclass, fields
from typing import Any

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.latency import Target
from llama_hpc.engine.layout import check_pages
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.engine.pipeline import PipelineConfig
from llama_hpc.engine.prepare import eos_ids, longest
from llama_hpc.engine.queue import RequestQueue, in_order
from llama_hpc.engine.replica import BatchPlan, Replica
from llama_hpc.engine.sampling_params import is_integer
from llama_hpc.engine.scheduler import StepLimits
from llama_hpc.engine.summary import RankReport
from llama_hpc.errors import UsageError
from llama_hpc.model.kv_cache import pages_in_a_part
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.runtime.abort import agreed
from llama_hpc.runtime.stopping import Stop


@dataclass(frozen=True)
class Batching:
    """How requests are put together, which changes speed and memory, never the answers; named as the options of ``run`` are."""

    max_seqs: int = 64
    token_budget: int = 8192
    micro_batches: int | None = None
    prefill_micro_batch: int | None = None
    decode_micro_batch: int | None = None
    kv_memory: int | None = None
    prefix_sharing: bool = True
    adapt: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None and not (is_integer(value) and value > 0):
                raise UsageError(f"{field.name} must be a whole number of at least 1, got {value!r}")


def plan_batches(job: ModelJob, ready: list[ReadyRequest], batching: Batching, targets: tuple[Target, ...] = ()) -> BatchPlan:
    """How replicas batch; the cache is as large as the rank of least room of each replica allows. Collective over the job.

    Raises UsageError, on every rank, where the cache cannot hold a request.
    """
    config, shape, parts = job.checkpoint.config, job.shape, job.settings.context_parallel
    most = max(r.params.n for r in ready)       # of which one replica answers all
    at_once = min(batching.max_seqs, max(most, -(-sum(r.params.n for r in ready) // shape.data)))
    pages, in_q8 = job.pages(batching.kv_memory)
    with agreed(job.comm, "planning the KV cache"):
        check_pages(pages, in_q8, ready, batching.kv_memory is not None, parts)
    budget = min(batching.token_budget, at_once * longest(ready))
    pipeline = PipelineConfig.for_model(config.num_layers, config.hidden_size, stages=shape.pipeline)
    depth = batching.micro_batches or pipeline.micro_batches
    prefill = batching.prefill_micro_batch or (budget if depth == 1 else pipeline.prefill_micro_batch)
    return BatchPlan(at_once, depth, StepLimits(budget, min(prefill, budget), batching.decode_micro_batch or 0),
                     min(pages, at_once * parts * pages_in_a_part(longest(ready), parts)), batching.prefix_sharing,
                     batching.adapt, targets)


def sizes_for(plan: BatchPlan, ready: list[ReadyRequest]) -> dict[str, int]:
    """The sizes of a stage (see TransformerStage) that these requests need."""
    return {"sequences": plan.max_seqs, "max_seq_len": longest(ready), "max_rows": plan.limits.token_budget,
            "max_outputs": plan.max_seqs, "pages": plan.pages}


class Crew:
    """One rank's part in a replica that can answer requests: the model loaded, the plan, and what it has done so far.

    ``job``: on the ranks that set it up together; ``tokenizer``: that of the model on leaders, or None without one. ``number`` is
    that of the replica among all that the job has ever had (None: its index in the grid); ``taken`` are the requests that its
    leader has ever admitted.
    """

    def __init__(self, job: ModelJob, stage: TransformerStage, plan: BatchPlan, tokenizer, number: int | None = None):
        self.job, self.stage, self.plan, self.tokenizer = job, stage, plan, tokenizer
        self.number = job.grid.data_index if number is None else number
        self.replica: Replica | None = None
        self.taken: set[int] = set()
        self._reports: list[RankReport] = []

    def answer(self, ready: list[ReadyRequest], keep=None, done: frozenset[tuple[int, int]] = frozenset(),
               stop: Stop | None = None) -> tuple[Replica, float, int]:
        """Answers this replica's share; ``keep``, ``done``, ``stop``: see Replica. Returns the replica, which has the answers (on
        its leader); seconds; tokens in all (first rank, elsewhere 0). Collective over the job."""
        order = in_order(ready, done)
        def run(counters, start: float, tick) -> Replica:
            grid = self.job.grid
            queue = RequestQueue(*order, counters, grid.data_index, grid.shape.data, self.at_once(ready))
            return self.run(ready, queue, counters, start, tick, keep=keep, done=done, stop=stop)
        return self.job.work(len(order[0]), "prompts", "answering", run)

    def run(self, ready: list[ReadyRequest], queue: RequestQueue, counters, origin: float, tick, **more) -> Replica:
        """Answers what ``queue`` has for this replica; ``more``: see Replica. Collective over the replica."""
        eos = eos_ids(self.job.checkpoint.config, self.tokenizer)
        def decode(ids) -> str:
            return self.tokenizer.decode(ids, continuation=True)
        self._note()
        self.replica = Replica(self.job.grid, self.stage, ready, self.plan, queue, counters, eos,
                               decode if self.tokenizer else None, origin, tick, taken=self.taken, number=self.number,
                               **more)
        self.replica.run()
        return self.replica

    def at_once(self, ready: list[ReadyRequest]) -> int:
        """How many requests run at a time even if each wants the most samples."""
        return max(1, self.plan.max_seqs // max(r.params.n for r in ready))

    def place(self) -> dict[str, Any]:
        """Where this rank is, and what it has done."""
        replica = self.replica
        done = replica.work() | {"answers": replica.finished} if replica else {}
        return self.job.place(self.stage) | done | {"micro_batches": self.plan.depth}

    @property
    def reports(self) -> list[RankReport]:
        """Of every time that it answered."""
        self._note()
        return self._reports

    def _note(self) -> None:
        replica, grid = self.replica, self.job.grid
        if replica is not None:
            place = self.number, grid.stage, grid.tensor_index
            self._reports.append(RankReport(*place, replica.work() | self.job.monitor.work(), replica.recorder.result()))
            self.replica = None
