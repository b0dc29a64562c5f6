"""A whole run, from the settings of the command line to the result file. Every step is collective over the world."""

import logging
from pathlib import Path

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.latency import Target, report
from llama_hpc.engine.layout import check_pages
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.engine.pipeline import PipelineConfig
from llama_hpc.engine.prepare import eos_ids, longest, prepare
from llama_hpc.engine.queue import RequestQueue, in_order
from llama_hpc.engine.replica import BatchPlan, Replica
from llama_hpc.engine.requests import read_requests
from llama_hpc.engine.scheduler import StepLimits
from llama_hpc.engine.summary import RankReport, arrays, summary, trace
from llama_hpc.errors import UsageError
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import pages_of
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Output, check_output_path, write_results
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.text import load_tokenizer

_LOG = logging.getLogger(__name__)


class Job(ModelJob):
    """One run of ``llama-hpc run``: ``run`` does everything. ``params`` are the sampling settings of all prompts."""

    def __init__(self, args, comm, node, threads, shape, params, targets: list[Target]):
        super().__init__(args, comm, node, threads, shape)
        self.params, self.targets, self.requests, self.texts = params, targets, [], []
        self.hashes: dict[str, str] | None = {} if args.hash_weights else None

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        ready = on_first(self.comm, self._read)
        self.open()
        samples = sum(r.params.n for r in ready)
        grid = self.choose_grid(samples, self.args.max_seqs, longest(ready),
                                -(-sum(r.params.n * (len(r.prompt) + r.limit) for r in ready) // samples))
        plan = self._plan(ready)
        self.announce(f"{plan.max_seqs} sequences and {plan.pages * PAGE} tokens in the cache of a replica")
        self.compile()
        stage = self.load(self.hashes if grid.data_index == 0 else None, sequences=plan.max_seqs, max_seq_len=longest(ready),
                          max_rows=plan.limits.token_budget, max_outputs=plan.max_seqs, pages=plan.pages)
        replica, seconds, tokens = self.work(
            len(ready), "prompts", "answering",
            lambda counters, start, tick: self._answer(stage, plan, ready, counters, start, tick))
        if self.first:
            _LOG.info("%d prompts answered with %d tokens in %.2f s: %.1f tokens/s",
                      len(ready), tokens, seconds, tokens / seconds)
        self.conclude(stage, seconds, replica.work() | {"answers": len(replica.outputs)}, micro_batches=plan.depth)
        self._finish(replica)
        return 0

    def _read(self) -> list[ReadyRequest]:
        """First rank: everything about the prompts and the output that can be checked before a weight is read."""
        check_output_path(self.args.output, self.args.overwrite)
        if self.args.trace:
            check_output_path(self.args.trace, overwrite=True)
        self.requests = read_requests(self.args.prompts, self.params)
        checkpoint = self.examine()
        tokenizer = load_tokenizer(checkpoint.path)
        if self.targets and self.requests[0].arrival_s is None:
            raise UsageError("--slo sets targets for requests that arrive over time: give each prompt its arrival_s")
        ready, self.texts = prepare(self.requests, tokenizer, checkpoint.config, self.args.max_seq_len)
        return ready

    def _plan(self, ready: list[ReadyRequest]) -> BatchPlan:
        """How replicas batch; the cache is as large as the rank of least room of each replica allows."""
        args, config, shape = self.args, self.checkpoint.config, self.grid.shape
        most = max(r.params.n for r in ready)       # of which one replica answers all
        at_once = min(args.max_seqs, max(most, -(-sum(r.params.n for r in ready) // shape.data)))
        pages = self.pages(args.kv_memory)
        with agreed(self.comm, "planning the KV cache"):
            check_pages(pages, ready, args.kv_memory is not None)
        budget = min(args.token_budget, at_once * longest(ready))
        pipeline = PipelineConfig.for_model(config.num_layers, config.hidden_size, stages=shape.pipeline)
        depth = args.micro_batches or pipeline.micro_batches
        prefill = args.prefill_micro_batch or (budget if depth == 1 else pipeline.prefill_micro_batch)
        return BatchPlan(at_once, depth, StepLimits(budget, min(prefill, budget), args.decode_micro_batch or 0),
                         min(pages, at_once * pages_of(longest(ready))), args.prefix_sharing, args.adapt, tuple(self.targets))

    def _answer(self, stage: TransformerStage, plan: BatchPlan, ready: list[ReadyRequest], counters: SharedCounters,
                start: float, tick) -> Replica:
        """This rank's part of a replica, which has the answers (on its leader)."""
        grid, checkpoint = self.grid, self.checkpoint
        tokenizer = load_tokenizer(checkpoint.path) if grid.is_leader else None
        eos = eos_ids(checkpoint.config, tokenizer)
        def decode(ids) -> str:
            return tokenizer.decode(ids, continuation=True)
        # So many requests run at a time even if each wants the most samples.
        at_once = max(1, plan.max_seqs // max(r.params.n for r in ready))
        queue = RequestQueue(*in_order(ready), counters, grid.data_index, grid.shape.data, at_once)
        replica = Replica(grid, stage, ready, plan, queue, counters, eos, decode if tokenizer else None, start, tick)
        replica.run()
        return replica

    def _finish(self, replica: Replica) -> None:
        grid = self.grid
        report = RankReport(grid.data_index, grid.stage, grid.tensor_index, replica.work(), replica.recorder.result())
        outputs = []
        gathered, hashes, reports = (self.comm.gather(part) for part in (replica.outputs, self.hashes, report))
        if self.first:
            self.facts["seed"] = self.params.seed
            if self.hashes is not None:
                self.facts["weights_sha256"] = {name: value for part in hashes for name, value in (part or {}).items()}
            outputs = [output for part in gathered for output in part]
        on_first(self.comm, self._write, outputs, reports)

    def _write(self, outputs: list[Output], reports: list[RankReport]) -> None:
        lines, warnings = summary(reports)
        tables = arrays(reports)
        if self.requests[0].arrival_s is not None:
            latency = report(outputs, self.targets)
            lines, tables = lines + latency.lines(), tables | latency.arrays()
        for line in lines:
            _LOG.info("%s", line)
        for line in warnings:
            _LOG.warning("%s", line)
        digest = write_results(self.args.output, self.requests, self.texts, outputs, self.facts, tables,
                               overwrite=self.args.overwrite)
        _LOG.info("results in %s, digest %s", self.args.output, digest)
        if self.args.trace:
            Path(self.args.trace).write_text(trace(reports), encoding="utf-8")
