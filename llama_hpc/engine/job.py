"""A whole run, from the settings of the command line to the result file. Every step is collective over the world."""

import argparse
import logging
from dataclasses import fields
from pathlib import Path

from mpi4py import MPI

from llama_hpc.engine.answering import Batching, answer, plan_batches, sizes_for
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.durable import Done, Durable, identity_of
from llama_hpc.engine.latency import Target, report
from llama_hpc.engine.model_job import ModelJob, ModelSettings
from llama_hpc.engine.prepare import longest, prepare
from llama_hpc.engine.replica import Replica
from llama_hpc.engine.requests import read_requests
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.engine.summary import RankReport, arrays, summary, trace
from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import cache_format
from llama_hpc.results import Output, check_output_path, write_results
from llama_hpc.runtime.abort import on_first
from llama_hpc.runtime.stopping import Stop
from llama_hpc.text import load_tokenizer
from llama_hpc.weights.checkpoint import weights_format

_LOG = logging.getLogger(__name__)


class Job(ModelJob):
    """One run of ``llama-hpc run`` with the options ``args``: ``run`` does everything. ``params``: what prompts do not set.
    ``stop``: when to end early."""

    def __init__(self, args: argparse.Namespace, settings: ModelSettings, comm: MPI.Comm, node: MPI.Comm, params: SamplingParams,
                 targets: list[Target], stop: Stop):
        super().__init__(settings, comm, node)
        self.args, self.params, self.targets, self.stop, self.requests, self.texts = args, params, targets, stop, [], []
        self.hashes: dict[str, str] | None = {} if args.hash_weights else None
        self.durable = Durable(args.output, args.resume, args.overwrite, args.sync_interval, args.rescue)

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        try:
            ready, done, complete = on_first(self.comm, self._read)
            if not complete:
                self._answer(ready, done)
        except BaseException:
            self.durable.abandon()
            raise
        return 0

    def _answer(self, ready: list[ReadyRequest], done: Done) -> None:
        self.open()
        samples = sum(r.params.n for r in ready)
        grid = self.choose_grid(samples, self.args.max_seqs, longest(ready),
                                -(-sum(r.params.n * (len(r.prompt) + r.limit) for r in ready) // samples))
        batching = Batching(**{field.name: getattr(self.args, field.name) for field in fields(Batching)})
        plan = plan_batches(self, ready, batching, tuple(self.targets))
        self.announce(f"{plan.max_seqs} sequences and {plan.pages * PAGE} tokens in the cache of a replica")
        self.compile()
        stage = self.make_stage(self.load(self.hashes if grid.data_index == 0 else None), **sizes_for(plan, ready))
        tokenizer = load_tokenizer(self.checkpoint.path) if grid.is_leader else None
        self.durable.begin(self)
        replica, seconds, tokens = answer(self, stage, plan, ready, tokenizer, self.durable.keep, done, self.stop)
        answers = self.comm.allreduce(replica.finished)
        if self.first:
            _LOG.info("%d answers with %d tokens in %.2f s: %.1f tokens/s", answers, tokens, seconds, tokens / seconds)
        self.conclude(stage, seconds, replica.work() | {"answers": replica.finished}, vars(self.args), micro_batches=plan.depth)
        self._finish(replica, samples)

    def _read(self) -> tuple[list[ReadyRequest], Done, bool]:
        """First rank: everything about the prompts and the output that can be checked before a weight is read.

        Returns the requests, what earlier runs have answered of them, and whether that is all, and in the output.
        """
        check_output_path(self.args.output, self.args.overwrite or self.args.resume)
        if self.args.trace:
            check_output_path(self.args.trace, overwrite=True)
        self.requests = read_requests(self.args.prompts, self.params)
        checkpoint = self.examine()
        tokenizer = load_tokenizer(checkpoint.path)
        if self.targets and self.requests[0].arrival_s is None:
            raise UsageError("--slo sets targets for requests that arrive over time: give each prompt its arrival_s")
        ready, self.texts = prepare(self.requests, tokenizer, checkpoint.config, self.args.max_seq_len)
        weights = weights_format(checkpoint, self.settings.weights)
        done = self.durable.examine(identity_of(ready, weights, cache_format(self.settings.kv_cache, weights)))
        return ready, done, self.durable.complete

    def _finish(self, replica: Replica, samples: int) -> None:
        grid = self.grid
        own = RankReport(grid.data_index, grid.stage, grid.tensor_index, replica.work(), replica.recorder.result())
        hashes, reports, reasons = (self.comm.gather(part) for part in (self.hashes, own, self.stop.reason))
        found = self.durable.collect(self)
        if self.first:
            self.facts["seed"] = self.params.seed
            if self.hashes is not None:
                self.facts["weights_sha256"] = {name: value for part in hashes for name, value in (part or {}).items()}
            self.facts["stopped"] = next(filter(None, reasons), "") if len(found.outputs) < samples else ""
            self.facts |= {"identity": self.durable.identity, "runs": found.runs, "torn_bytes": found.torn}
        on_first(self.comm, self._write, found.outputs, reports)

    def _write(self, outputs: list[Output], reports: list[RankReport]) -> None:
        stopped, samples = self.facts["stopped"], sum(request.params.n for request in self.requests)
        if len(outputs) != samples and not stopped:
            raise ResultsError(f"{self.durable.folder.path} has {len(outputs)} of {samples} answers, all of which were "
                               "found: its file system has lost some, --resume computes them again")
        lines, warnings = summary(reports)
        tables = arrays(reports)
        if outputs and self.requests[0].arrival_s is not None:
            latency = report(outputs, self.targets)
            lines, tables = lines + latency.lines(), tables | latency.arrays()
        for line in lines:
            _LOG.info("%s", line)
        for line in warnings:
            _LOG.warning("%s", line)
        try:
            digest = write_results(self.args.output, self.requests, self.texts, outputs, self.facts, tables,
                                   status="incomplete" if stopped else "complete",
                                   overwrite=self.args.overwrite or self.args.resume)
        except ResultsError as error:
            raise ResultsError(f"{error}: all answers are kept in {self.durable.folder.path}: make room, then --resume") from None
        if stopped:
            _LOG.warning("stopped by %s: %s has %d of %d answers, --resume goes on", stopped, self.args.output, len(outputs),
                         samples)
        else:
            _LOG.info("results in %s, digest %s", self.args.output, digest)
            self.durable.end()
        if self.args.trace:
            Path(self.args.trace).write_text(trace(reports), encoding="utf-8")
