"""A whole run, from the settings of the command line to the result file. Every step is collective over the world."""

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpi4py import MPI

from llama_hpc.engine import incidents
from llama_hpc.engine.answering import Batching, Crew, plan_batches, sizes_for
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.durable import Done, Durable, identity_of
from llama_hpc.engine.latency import Target, report
from llama_hpc.engine.model_job import ModelJob, ModelSettings
from llama_hpc.engine.prepare import longest, outputs_of, prepare
from llama_hpc.engine.replica import BatchPlan
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
        self.identity: dict[str, Any] = {}
        self.hashes: dict[str, str] | None = {} if args.hash_weights else None
        self.durable = Durable(args.output, args.resume, args.overwrite, args.sync_interval, args.rescue, args.dry_run)
        self.durable.stop = stop

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        try:
            self.answer_all()
        except BaseException:
            self.durable.abandon()
            raise
        return 0

    def answer_all(self) -> None:
        """Everything, or what can be done until there is a reason to stop."""
        ready, done, complete = on_first(self.comm, self.read)
        self.durable.ours = not complete
        if complete:
            return
        crew = self.set_up(ready)
        seconds = crew.answer(ready, self.durable.keep, done, self.stop)[1]
        places, reports = crew.place(), crew.reports
        crew.stage.free()
        self.finish(places, reports, self.grid.shape, seconds)

    def read(self) -> tuple[list[ReadyRequest], Done, bool]:
        """First rank: everything about the prompts and the output that can be checked before a weight is read.

        Returns the requests, what earlier runs have answered of them, and whether that is all, and in the output.
        """
        check_output_path(self.args.output, self.args.overwrite or self.args.resume)
        if self.args.trace:
            check_output_path(self.args.trace, overwrite=True)
        ready = self.read_prompts()
        if self.targets and self.requests[0].arrival_s is None:
            raise UsageError("--slo sets targets for requests that arrive over time: give each prompt its arrival_s")
        return ready, self.durable.examine(self.identity), self.durable.complete

    def read_prompts(self) -> list[ReadyRequest]:
        """First rank: the requests; what decides the answers to them becomes ``identity``."""
        self.requests = read_requests(self.args.prompts, self.params)
        self.checkpoint = self.examine()
        config = self.checkpoint.config
        ready, self.texts = prepare(self.requests, load_tokenizer(self.checkpoint.path), config, self.args.max_seq_len)
        self.weights = weights_format(self.checkpoint, self.settings.weights)
        self.kv_cache = cache_format(self.settings.kv_cache, self.weights)
        self.identity = identity_of(ready, self.weights, self.kv_cache)
        return ready

    def set_up(self, ready: list[ReadyRequest], number: int = 0) -> Crew:
        """This rank's part in a replica that can answer the requests; ``number`` is that of the grid's first replica."""
        self.open()
        self.outputs = outputs_of(ready)
        grid = self.choose_grid(*self.grid_sizes(ready))
        plan = self.plan(ready)
        self.announce(f"{plan.max_seqs} sequences and {plan.pages * PAGE} tokens in the cache of a replica")
        self.compile()
        stage = self.make_stage(self.load(self.hashes if grid.data_index == 0 else None), **sizes_for(plan, ready))
        tokenizer = load_tokenizer(self.checkpoint.path) if grid.is_leader else None
        self.durable.begin(self, number)
        return Crew(self, stage, plan, tokenizer, number + grid.data_index)

    def plan(self, ready: list[ReadyRequest]) -> BatchPlan:
        """How the replicas of the grid batch."""
        batching = Batching(**{field.name: getattr(self.args, field.name) for field in fields(Batching)})
        return plan_batches(self, ready, batching, tuple(self.targets))

    def grid_sizes(self, ready: list[ReadyRequest]) -> tuple[int, int, int, int]:
        """What a grid is chosen for: answers, sequences at a time, positions of the longest one and of a usual one."""
        samples = sum(r.params.n for r in ready)
        usual = -(-sum(r.params.n * (len(r.prompt) + r.limit) for r in ready) // samples)
        return samples, self.args.max_seqs, longest(ready), usual

    def finish(self, place: dict[str, Any] | None, reports: list[RankReport], shape, seconds: float) -> None:
        """From what every rank has done to the output. ``place``: of a rank of a replica; ``reports`` of all it took part in."""
        places, hashes, gathered, reasons = (self.comm.gather(part) for part in (place, self.hashes, reports, self.stop.reason))
        found = self.durable.collect(self)
        counts = self.comm.reduce(self.incidents)
        if self.first:
            places = [place for place in places if place]
            self.complete_facts(places, shape, self.durable.identity["model content"], seconds, vars(self.args),
                                {"micro_batches": places[0]["micro_batches"]} if places else {})
            self.facts["seed"] = self.params.seed
            if self.hashes is not None:
                self.facts["weights_sha256"] = {name: value for part in hashes for name, value in (part or {}).items()}
            samples = sum(request.params.n for request in self.requests)
            self.facts["stopped"] = next(filter(None, reasons), "") if len(found.outputs) < samples else ""
            self.facts |= {"identity": self.durable.identity, "runs": found.runs, "torn_bytes": found.torn}
            gathered = [report for part in gathered for report in part]
            counts.update(incidents.of_reports(gathered), torn_bytes=found.torn,
                          resumed_answers=sum(output.attempt != self.durable.run for output in found.outputs))
            self.facts["incidents"] = incidents.totals(counts)
        on_first(self.comm, self._write, found.outputs, gathered, seconds)
        self.durable.close()
        self.comm.Barrier()
        if self.first and not self.facts["stopped"]:
            self.durable.end()

    def _write(self, outputs: list[Output], reports: list[RankReport], seconds: float) -> None:
        stopped, samples = self.facts["stopped"], sum(request.params.n for request in self.requests)
        if len(outputs) != samples and not stopped:
            raise ResultsError(f"{self.durable.folder.path} has {len(outputs)} of {samples} answers, all of which were "
                               "found: its file system has lost some, --resume computes them again")
        own = [output for output in outputs if output.attempt == self.durable.run]
        tokens = sum(len(output.tokens) for output in own)
        _LOG.info("%d answers with %d tokens in %.2f s: %.1f tokens/s", len(own), tokens, seconds, tokens / max(seconds, 1e-9))
        lines, warnings = summary(reports)
        tables = arrays(reports)
        if outputs and self.requests[0].arrival_s is not None:
            latency = report(outputs, self.targets)
            lines, tables = lines + latency.lines(), tables | latency.arrays()
        for line in lines + incidents.lines(self.facts["incidents"]):
            _LOG.info("%s", line)
        for line in warnings:
            _LOG.warning("%s", line)
        try:
            digest = write_results(self.args.output, self.requests, self.texts, outputs, self.facts, tables,
                                   status="incomplete" if stopped else "complete",
                                   overwrite=self.args.overwrite or self.args.resume, rescue=self.durable.rescue)
        except ResultsError as error:
            kept = f"; all answers are kept in {self.durable.folder.path}" if self.durable.folder.parts else ""
            raise ResultsError(f"{error}{kept}: make room or mend the file system, then --resume") from None
        if stopped:
            _LOG.warning("stopped by %s: %s has %d of %d answers, --resume goes on", stopped, self.args.output, len(outputs),
                         samples)
        else:
            _LOG.info("results in %s, digest %s", self.args.output, digest)
        if self.args.trace:
            Path(self.args.trace).write_text(trace(reports), encoding="utf-8")
