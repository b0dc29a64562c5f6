"""A whole run, from the settings of the command line to the result file. Every step is collective over the world."""

import argparse
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

from mpi4py import MPI

from llama_hpc.comm.choose import tensor_reducer
from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.latency import Target, report
from llama_hpc.engine.layout import auto_grid, cache_pages, check_pages
from llama_hpc.engine.pipeline import PipelineConfig
from llama_hpc.engine.prepare import eos_ids, longest, prepare
from llama_hpc.engine.queue import COUNTERS, FINISHED, TOKENS, RequestQueue
from llama_hpc.engine.replica import BatchPlan, Replica
from llama_hpc.engine.requests import read_requests
from llama_hpc.engine.scheduler import StepLimits
from llama_hpc.engine.summary import RankReport, arrays, summary, trace
from llama_hpc.engine.warmup import once_per_node, warm_up
from llama_hpc.errors import UsageError
from llama_hpc.grid import Grid, GridShape
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import pages_of
from llama_hpc.model.shares import TensorShare, check_grid, stage_shares
from llama_hpc.model.sizes import packed_bits, parameters
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Output, check_output_path, write_results
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.runtime.progress import Progress
from llama_hpc.runtime.provenance import collect
from llama_hpc.runtime.topology import available_memory, hostname, node_cores, thread_places
from llama_hpc.text import load_tokenizer
from llama_hpc.weights.checkpoint import Checkpoint, open_checkpoint, weights_format
from llama_hpc.weights.fingerprint import fingerprint
from llama_hpc.weights.loader import PeerFailed, load_stage, loading_steps
from llama_hpc.weights.store import Store

_LOG = logging.getLogger(__name__)
_POLL = 0.2                     # seconds between looks at the shared counters


class Job:
    """One run on ``comm``, the world: ``run`` does everything. ``args`` are the options of ``llama-hpc run``."""

    def __init__(self, args: argparse.Namespace, comm: MPI.Comm, node: MPI.Comm, threads: int, shape: GridShape | None, params,
                 targets: list[Target]):
        self.args, self.comm, self.node, self.threads = args, comm, node, threads
        self.asked_shape, self.params, self.targets = shape, params, targets
        self.first = comm.rank == 0
        self.facts = collect() if self.first else {}
        self.requests, self.texts = [], []
        self.hashes: dict[str, str] | None = {} if args.hash_weights else None
        with agreed(comm, "starting the threads"):
            self.pool, self.places = Pool(threads), thread_places(threads)

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        ready = on_first(self.comm, self._read)
        with agreed(self.comm, "opening the model"):
            checkpoint = open_checkpoint(self.args.model)
            self.weights = weights_format(checkpoint, self.args.weights)
        shape = self._shape(checkpoint, ready)
        grid = Grid.create(self.comm, shape)
        plan = self._plan(checkpoint, grid, ready)
        self._announce(checkpoint, grid, plan)
        self._compile()
        stage = self._load(checkpoint, grid, plan, longest(ready))
        content_hash = fingerprint(checkpoint, self.comm)
        replica, seconds = self._answer(grid, stage, plan, ready, checkpoint)
        self._finish(grid, stage, plan, replica, seconds, content_hash)
        return 0

    def _read(self) -> list[ReadyRequest]:
        """First rank: everything about the prompts and the output that can be checked before a weight is read."""
        check_output_path(self.args.output, self.args.overwrite)
        self.requests = read_requests(self.args.prompts, self.params)
        checkpoint = open_checkpoint(self.args.model)
        weights_format(checkpoint, self.args.weights)
        self.facts["model"] = {"name": self.args.model, "path": str(Path(checkpoint.path).resolve())}
        if isinstance(checkpoint, Store):
            self.facts["model"] |= {"source": checkpoint.source, "source_content_hash": checkpoint.source_content_hash}
        tokenizer = load_tokenizer(checkpoint.path)
        if self.targets and self.requests[0].arrival_s is None:
            raise UsageError("--slo sets targets for requests that arrive over time: give each prompt its arrival_s")
        ready, self.texts = prepare(self.requests, tokenizer, checkpoint.config, self.args.max_seq_len)
        return ready

    def _shape(self, checkpoint: Checkpoint, ready: list[ReadyRequest]) -> GridShape:
        self.memory = memory = self.comm.allreduce(available_memory() // self.node.size, MPI.MIN)
        per_node = self.comm.allreduce(self.node.size, MPI.MIN)
        samples = sum(r.params.n for r in ready)
        with agreed(self.comm, "choosing the grid"):
            shape = self.asked_shape or auto_grid(
                checkpoint.config, self.weights, self.comm.size, per_node, memory, samples, self.args.max_seqs,
                longest(ready), -(-sum(r.params.n * (len(r.prompt) + r.limit) for r in ready) // samples))
            check_grid(checkpoint.config, shape)
        return shape

    def _plan(self, checkpoint: Checkpoint, grid: Grid, ready: list[ReadyRequest]) -> BatchPlan:
        """How replicas batch; the cache is as large as the rank of least room of each replica allows."""
        args, config, shape = self.args, checkpoint.config, grid.shape
        most = max(r.params.n for r in ready)       # of which one replica answers all
        at_once = min(args.max_seqs, max(most, -(-sum(r.params.n for r in ready) // shape.data)))
        pages = cache_pages(config, self.weights, stage_shares(config, shape.pipeline)[grid.stage],
                            TensorShare.of(config, shape.tensor, grid.tensor_index), self.memory, args.kv_memory)
        pages = self.comm.allreduce(pages, MPI.MIN)
        with agreed(self.comm, "planning the KV cache"):
            check_pages(pages, ready, args.kv_memory is not None)
        budget = min(args.token_budget, at_once * longest(ready))
        pipeline = PipelineConfig.for_model(config.num_layers, config.hidden_size, stages=shape.pipeline)
        depth = args.micro_batches or pipeline.micro_batches
        prefill = args.prefill_micro_batch or (budget if depth == 1 else pipeline.prefill_micro_batch)
        return BatchPlan(at_once, depth, StepLimits(budget, min(prefill, budget), args.decode_micro_batch or 0),
                         min(pages, at_once * pages_of(longest(ready))), args.prefix_sharing, args.adapt, tuple(self.targets))

    def _announce(self, checkpoint: Checkpoint, grid: Grid, plan: BatchPlan) -> None:
        hosts = len(set(self.comm.allgather(hostname())))
        if not self.first:
            return
        config, weights = checkpoint.config, self.weights
        _LOG.info("%s: %s, %.1f M parameters, weights %s (%.2f bits all in)", self.args.model, config.family,
                  parameters(config) / 1e6, weights, packed_bits(config, weights)[1])
        _LOG.info("grid %s (replicas x stages x tensor ranks): %d ranks on %d host%s, %d thread%s each (%s kernels), "
                  "%d sequences and %d tokens in the cache of a replica", grid.shape, self.comm.size, hosts, "s" * (hosts > 1),
                  self.threads, "s" * (self.threads > 1), kernels(), plan.max_seqs, plan.pages * PAGE)

    def _compile(self) -> None:
        start = time.monotonic()
        once_per_node(self.node, lambda: warm_up(self.weights, self.pool, MPI.COMM_SELF))
        # Not before: the threads that quantise, now started, would inherit the one place of this thread.
        self.pool.bind(self.places)
        if self.first and time.monotonic() - start > 2:
            _LOG.info("kernels ready after %.1f s", time.monotonic() - start)

    def _reducer(self, checkpoint: Checkpoint, grid: Grid, plan: BatchPlan) -> TensorReducer:
        """Joins over the tensor group, in shared memory where --reduce and the place of the ranks allow."""
        comm, mode = grid.tensor_comm, self.args.reduce
        hidden_size = checkpoint.config.hidden_size
        with agreed(self.comm, "preparing the reductions"):
            # Two regions of int64 sums and one of float32 rows.
            return tensor_reducer(comm, mode, self.node.size * self.threads > node_cores(),
                                  plan.limits.token_budget * hidden_size * (2 * 8 + 4))

    def _load(self, checkpoint: Checkpoint, grid: Grid, plan: BatchPlan, max_seq_len: int) -> TransformerStage:
        config, shape = checkpoint.config, grid.shape
        part = stage_shares(config, shape.pipeline)[grid.stage]
        share = TensorShare.of(config, shape.tensor, grid.tensor_index)
        reducer, stage = self._reducer(checkpoint, grid, plan), None
        hashes = self.hashes if grid.data_index == 0 else None
        steps = loading_steps(config, self.weights, part, grid.stage_comm, packed=isinstance(checkpoint, Store))
        with agreed(self.comm, "loading the weights"), Progress(steps, "tensors", "loading", show=self.first) as progress:
            try:
                weights = load_stage(checkpoint, self.weights, part, share, reducer, grid.stage_comm, threads=self.threads,
                                     progress=progress.update, hashes=hashes, pool=self.pool)
                stage = TransformerStage(config, part, share, weights, reducer, self.pool, sequences=plan.max_seqs,
                                         max_seq_len=max_seq_len, max_rows=plan.limits.token_budget, max_outputs=plan.max_seqs,
                                         pages=plan.pages)
            except PeerFailed:
                pass    # The rank that failed says why.
        return stage

    def _answer(self, grid: Grid, stage: TransformerStage, plan: BatchPlan, ready: list[ReadyRequest], checkpoint: Checkpoint
                ) -> tuple[Replica, float]:
        """This rank's part of a replica, which has the answers (on its leader), and the seconds that the job took to answer."""
        tokenizer = load_tokenizer(checkpoint.path) if grid.is_leader else None
        eos = eos_ids(checkpoint.config, tokenizer)
        def decode(ids) -> str:
            return tokenizer.decode(ids, continuation=True)
        counters = SharedCounters(self.comm, COUNTERS)
        self.comm.Barrier()
        start = time.monotonic()
        with Progress(len(ready), "prompts", "answering", show=self.first) as progress:
            watch = _Watch(counters, progress) if self.first else None
            stage.reducer.reset()
            # So many requests run at a time even if each wants the most samples.
            at_once = max(1, plan.max_seqs // max(r.params.n for r in ready))
            queue = RequestQueue(ready, counters, grid.data_index, grid.shape.data, at_once)
            replica = Replica(grid, stage, ready, plan, queue, counters, eos, decode if tokenizer else None, start, watch)
            replica.run()
            if watch:
                watch.until(len(ready))
        self.comm.Barrier()
        seconds = time.monotonic() - start
        if self.first:
            tokens = counters.read(TOKENS)
            _LOG.info("%d prompts answered with %d tokens in %.2f s: %.1f tokens/s",
                      len(ready), tokens, seconds, tokens / seconds)
        counters.free()
        return replica, seconds

    def _finish(self, grid: Grid, stage: TransformerStage, plan: BatchPlan, replica: Replica, seconds: float, content_hash: str
                ) -> None:
        outputs, work = replica.outputs, replica.work()
        report = RankReport(grid.data_index, grid.stage, grid.tensor_index, work, replica.recorder.result())
        ranks = self.comm.gather({"host": hostname(), "data": grid.data_index, "stage": grid.stage, "tensor": grid.tensor_index,
                                  "weight_bytes": stage.weights.nbytes, "cache_bytes": stage.cache.nbytes,
                                  "answers": len(outputs), "kernels": kernels()} | work)
        gathered, hashes, reports = self.comm.gather(outputs), self.comm.gather(self.hashes), self.comm.gather(report)
        if self.first:
            shape = grid.shape
            settings = {name: value for name, value in vars(self.args).items() if name != "command" and value is not None}
            self.facts["model"]["content_hash"] = content_hash
            self.facts |= {
                "weights": self.weights, "seed": self.params.seed, "ranks": self.comm.size, "threads": self.threads,
                "grid": {"data": shape.data, "pipeline": shape.pipeline, "tensor": shape.tensor},
                "kernels": sorted({rank["kernels"] for rank in ranks}),
                "hosts": sorted({rank["host"] for rank in ranks}), "rank_table": ranks,
                "settings": settings | {"weights": self.weights, "threads": self.threads, "grid": str(shape),
                                        "micro_batches": plan.depth},
                "end_time": datetime.now(UTC).isoformat(timespec="seconds"), "wall_seconds": seconds,
            }
            if self.hashes is not None:
                self.facts["weights_sha256"] = {name: value for part in hashes for name, value in (part or {}).items()}
            outputs = [output for part in gathered for output in part]
        stage.reducer.free()
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


class _Watch:
    """Moves the progress bar of the first rank by the shared counters, and drives MPI for the others' one-sided calls."""

    def __init__(self, counters: SharedCounters, progress: Progress):
        self.counters, self.progress, self._last = counters, progress, 0.0

    def __call__(self) -> None:
        self.counters.comm.Iprobe()
        if time.monotonic() - self._last >= _POLL:
            self._look()

    def _look(self) -> None:
        self._last = time.monotonic()
        self.progress.update(self.counters.read(FINISHED) - self.progress.done)

    def until(self, total: int) -> None:
        """Waits for the other replicas; looks often, as the time until the last answer is measured."""
        self._look()
        while self.progress.done < total:
            time.sleep(0.01)
            self.counters.comm.Iprobe()
            self._look()

