"""A whole job of scoring, from the command line to the file of scores. Every step is collective over the world."""

import logging

import numpy as np

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.documents import ReadyDocument, Window, read_documents, tokenize, window_and_stride, windows_of
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.engine.packing import MOST_WINDOWS, pages_needed
from llama_hpc.engine.queue import RequestQueue
from llama_hpc.engine.scorer import ScorePlan, Scorer
from llama_hpc.errors import UsageError
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Score, check_output_path, write_scores
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.text import load_tokenizer

_LOG = logging.getLogger(__name__)


class ScoreJob(ModelJob):
    """One run of ``llama-hpc score``: ``run`` does everything."""

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        documents, self.window, self.stride = on_first(self.comm, self._read)
        windows = windows_of(documents, self.window, self.stride)
        rows = [window.rows for window in windows]
        self.open()
        budget, longest = min(self.args.token_budget, sum(rows)), max(rows)
        pages = pages_needed(budget, longest)
        # The logits of a step, on a rank that has the whole vocabulary.
        logits = 4 * budget * self.checkpoint.config.vocab_size
        shape = self.choose_grid(1, 1, pages * PAGE, reserved=logits).shape
        plan = ScorePlan(budget, shape.pipeline, pages)
        self._check_pages(plan)
        self.announce(f"windows of {self.window} tokens, one every {self.stride}: {len(windows)} for {len(documents)} documents")
        self.compile()
        stage = self.load(sequences=MOST_WINDOWS, max_seq_len=longest, max_rows=budget, max_outputs=budget, pages=pages)
        (found, work), seconds, tokens = self.work(
            len(windows), "windows", "scoring",
            lambda counters, start, tick: self._score(stage, plan, documents, windows, counters, tick))
        if self.first:
            _LOG.info("%d tokens scored in %.2f s: %.1f tokens/s", tokens, seconds, tokens / seconds)
        self.conclude(stage, seconds, work, window=self.window, stride=self.stride)
        gathered = self.comm.gather(found)
        on_first(self.comm, self._write, documents, windows, gathered)
        return 0

    def _read(self) -> tuple[list[ReadyDocument], int, int]:
        """First rank: everything about the texts and the output that can be checked before a weight is read."""
        check_output_path(self.args.output, self.args.overwrite)
        documents = read_documents(self.args.texts)
        checkpoint = self.examine()
        window, stride = window_and_stride(self.args.window, self.args.stride, checkpoint.config)
        return tokenize(documents, load_tokenizer(checkpoint.path), checkpoint.config), window, stride

    def _check_pages(self, plan: ScorePlan) -> None:
        available = self.pages()
        with agreed(self.comm, "planning the KV cache"):
            if available < plan.pages:
                raise UsageError(f"the KV cache holds {available * PAGE} tokens, but scoring needs {plan.pages * PAGE}: use more "
                                 "ranks in a replica, a smaller --weights format, --window or --token-budget")

    def _score(self, stage: TransformerStage, plan: ScorePlan, documents: list[ReadyDocument], windows: list[Window],
               counters: SharedCounters, tick) -> tuple[dict[int, np.ndarray], dict[str, int]]:
        """What this replica found (on its leader, else nothing), and what this rank did."""
        # Longest first, see ``queue.by_cost``; what a replica needs to begin with is dealt.
        order = sorted(range(len(windows)), key=lambda number: -windows[number].rows)
        dealt = max(1, plan.depth * plan.budget // windows[order[0]].rows)
        queue = RequestQueue(order, None, counters, self.grid.data_index, self.grid.shape.data, dealt)
        scorer = Scorer(self.grid, stage, documents, windows, plan, queue, counters, tick)
        return scorer.run(), scorer.work()

    def _write(self, documents: list[ReadyDocument], windows: list[Window], gathered: list[dict[int, np.ndarray]]) -> None:
        logprobs = [np.full(len(document.tokens), np.nan, np.float32) for document in documents]
        for found in gathered:
            for number, values in found.items():
                window = windows[number]
                logprobs[window.document][window.first : window.stop] = values
        scores = [Score(document.id, document.tokens, values) for document, values in zip(documents, logprobs, strict=True)]
        digest, perplexity = write_scores(self.args.output, scores, self.window, self.stride, self.facts,
                                          overwrite=self.args.overwrite)
        _LOG.info("perplexity %.6g, scores in %s, digest %s", perplexity, self.args.output, digest)
