"""Scoring documents with a loaded model: the plan for their windows, and the replicas at work."""

import numpy as np

from llama_hpc.engine.documents import ReadyDocument, Window
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.engine.packing import MOST_WINDOWS, pages_needed
from llama_hpc.engine.queue import RequestQueue
from llama_hpc.engine.scorer import ScorePlan, Scorer
from llama_hpc.errors import UsageError
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Score
from llama_hpc.runtime.abort import agreed


def plan_scoring(job: ModelJob, windows: list[Window], budget: int) -> ScorePlan:
    """How replicas score ``windows`` in steps of ``budget`` tokens. Collective over the job.

    Raises UsageError, on every rank, where the cache is too small.
    """
    longest = max(window.rows for window in windows)
    plan = ScorePlan(budget, job.grid.shape.pipeline, pages_needed(budget, longest, job.settings.context_parallel))
    available, in_q8 = job.pages()
    with agreed(job.comm, "planning the KV cache"):
        if available < plan.pages:
            cache = "--kv-cache q8, " if in_q8 >= plan.pages else ""
            raise UsageError(f"the KV cache holds {available * PAGE} tokens, but scoring needs {plan.pages * PAGE}: use more "
                             f"ranks in a replica, {cache}a smaller --weights format, --window or --token-budget")
    return plan


def sizes_for(plan: ScorePlan, windows: list[Window]) -> dict[str, int]:
    """The sizes of a stage (see TransformerStage) that this plan needs."""
    return {"sequences": MOST_WINDOWS, "max_seq_len": max(window.rows for window in windows), "max_rows": plan.budget,
            "max_outputs": plan.budget, "pages": plan.pages}


def score(job: ModelJob, stage: TransformerStage, plan: ScorePlan, documents: list[ReadyDocument], windows: list[Window]
          ) -> tuple[tuple[dict[int, np.ndarray], dict[str, int]], float, int]:
    """What this replica found (on its leader, else nothing) and what this rank did; seconds; tokens in all (first rank, elsewhere
    0). Collective over the job."""
    # Longest first, see ``queue.by_cost``; what a replica needs to begin with is dealt.
    order = sorted(range(len(windows)), key=lambda number: -windows[number].rows)
    dealt = max(1, plan.depth * plan.budget // windows[order[0]].rows)
    def run(counters, start: float, tick):
        queue = RequestQueue(order, None, counters, job.grid.data_index, job.grid.shape.data, dealt)
        scorer = Scorer(job.grid, stage, documents, windows, plan, queue, counters, start, tick)
        scorer.run()
        return scorer.logprobs, scorer.work()
    return job.work(len(windows), "windows", "scoring", run)


def scores_of(documents: list[ReadyDocument], windows: list[Window], gathered: list[dict[int, np.ndarray]]) -> list[Score]:
    """The scores of all documents, from what all ranks found."""
    logprobs = [np.full(len(document.tokens), np.nan, np.float32) for document in documents]
    for found in gathered:
        for number, values in found.items():
            window = windows[number]
            logprobs[window.document][window.first : window.stop] = values
    return [Score(document.id, document.tokens, values) for document, values in zip(documents, logprobs, strict=True)]
