"""A whole job of scoring, from the command line to the file of scores. Every step is collective over the world."""

import argparse
import logging

from mpi4py import MPI

from llama_hpc.engine.documents import ReadyDocument, Window, read_documents, tokenize, window_and_stride, windows_of
from llama_hpc.engine.model_job import ModelJob, ModelSettings
from llama_hpc.engine.packing import pages_needed
from llama_hpc.engine.scoring import plan_scoring, score, scores_of, sizes_for
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.results import check_output_path, check_rescue, write_scores
from llama_hpc.runtime.abort import on_first
from llama_hpc.text import load_tokenizer

_LOG = logging.getLogger(__name__)


class ScoreJob(ModelJob):
    """One run of ``llama-hpc score`` with the options ``args``: ``run`` does everything."""

    outputs = 1.0

    def __init__(self, args: argparse.Namespace, settings: ModelSettings, comm: MPI.Comm, node: MPI.Comm):
        super().__init__(settings, comm, node)
        self.args = args

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        documents, self.window, self.stride = on_first(self.comm, self._read)
        windows = windows_of(documents, self.window, self.stride)
        rows = [window.rows for window in windows]
        self.open()
        budget = min(self.args.token_budget, sum(rows))
        # The logits of a step, on a rank that has the whole vocabulary.
        logits = 4 * budget * self.checkpoint.config.vocab_size
        self.choose_grid(1, 1, pages_needed(budget, max(rows), self.settings.context_parallel) * PAGE, reserved=logits)
        plan = plan_scoring(self, windows, budget)
        self.announce(f"windows of {self.window} tokens, one every {self.stride}: {len(windows)} for {len(documents)} documents")
        self.compile()
        stage = self.make_stage(self.load(), **sizes_for(plan, windows))
        (found, work), seconds, tokens = score(self, stage, plan, documents, windows)
        if self.first:
            _LOG.info("%d tokens scored in %.2f s: %.1f tokens/s", tokens, seconds, tokens / seconds)
        self.conclude(stage, seconds, work, vars(self.args), window=self.window, stride=self.stride)
        gathered = self.comm.gather(found)
        on_first(self.comm, self._write, documents, windows, gathered)
        return 0

    def _read(self) -> tuple[list[ReadyDocument], int, int]:
        """First rank: everything about the texts and the output that can be checked before a weight is read."""
        check_output_path(self.args.output, self.args.overwrite)
        self.rescue = check_rescue(self.args.rescue)
        documents = read_documents(self.args.texts)
        checkpoint = self.examine()
        window, stride = window_and_stride(self.args.window, self.args.stride, checkpoint.config)
        return tokenize(documents, load_tokenizer(checkpoint.path), checkpoint.config), window, stride

    def _write(self, documents: list[ReadyDocument], windows: list[Window], gathered: list[dict]) -> None:
        scores = scores_of(documents, windows, gathered)
        digest, perplexity = write_scores(self.args.output, scores, self.window, self.stride, self.facts,
                                          overwrite=self.args.overwrite, rescue=self.rescue)
        _LOG.info("perplexity %.6g, scores in %s, digest %s", perplexity, self.args.output, digest)
