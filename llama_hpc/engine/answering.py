"""Answering requests with a loaded model: the plan for them, and the replicas at work."""

from dataclasses import dataclass, fields

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
    config, shape, parts = job.checkpoint.config, job.grid.shape, job.settings.context_parallel
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


def answer(job: ModelJob, stage: TransformerStage, plan: BatchPlan, ready: list[ReadyRequest], tokenizer, keep=None,
           done: frozenset[tuple[int, int]] = frozenset(), stop: Stop | None = None) -> tuple[Replica, float, int]:
    """This rank's part of a replica, which has the answers (on its leader); seconds; tokens in all (first rank, elsewhere 0).

    ``tokenizer``: that of the model on leaders, or None without one; ``keep``, ``done``, ``stop``: see Replica. Collective over
    the job.
    """
    grid, eos = job.grid, eos_ids(job.checkpoint.config, tokenizer)
    def decode(ids) -> str:
        return tokenizer.decode(ids, continuation=True)
    # So many requests run at a time even if each wants the most samples.
    at_once = max(1, plan.max_seqs // max(r.params.n for r in ready))
    order = in_order(ready, done)
    def run(counters, start: float, tick) -> Replica:
        queue = RequestQueue(*order, counters, grid.data_index, grid.shape.data, at_once)
        replica = Replica(grid, stage, ready, plan, queue, counters, eos, decode if tokenizer else None, start, tick, keep,
                          done, stop)
        replica.run()
        return replica
    return job.work(len(order[0]), "prompts", "answering", run)
