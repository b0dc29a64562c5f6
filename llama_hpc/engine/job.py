"""A whole run, from the settings of the command line to the result file. Every step is collective over the world."""

import logging

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.layout import check_pages
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.engine.prepare import longest, prepare
from llama_hpc.engine.queue import RequestQueue, by_cost
from llama_hpc.engine.replica import BatchPlan, Replica
from llama_hpc.engine.requests import read_requests
from llama_hpc.engine.scheduler import StepLimits
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import pages_of
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Output, check_output_path, write_results
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.text import load_tokenizer

_LOG = logging.getLogger(__name__)
PREFILL = 512                   # prompt tokens of a step on a pipeline


class Job(ModelJob):
    """One run of ``llama-hpc run``: ``run`` does everything. ``params`` are the sampling settings of all prompts."""

    def __init__(self, args, comm, node, threads, shape, params):
        super().__init__(args, comm, node, threads, shape)
        self.params, self.requests, self.texts = params, [], []
        self.hashes: dict[str, str] | None = {} if args.hash_weights else None

    def run(self) -> int:
        """Raises what goes wrong, on every rank where all share it; returns 0."""
        ready = on_first(self.comm, self._read)
        self.open()
        grid = self.choose_grid(len(ready), self.args.max_seqs, longest(ready),
                                -(-sum(len(r.prompt) + r.limit for r in ready) // len(ready)))
        plan = self._plan(ready)
        self.announce(f"{plan.max_seqs} sequences and {plan.pages * PAGE} tokens in the cache of a replica")
        self.compile()
        stage = self.load(self.hashes if grid.data_index == 0 else None, sequences=plan.max_seqs, max_seq_len=longest(ready),
                          max_rows=plan.limits.token_budget, max_outputs=plan.max_seqs, pages=plan.pages)
        (outputs, work), seconds, tokens = self.work(
            len(ready), "prompts", "answering",
            lambda counters, start, tick: self._answer(stage, plan, ready, counters, start, tick))
        if self.first:
            _LOG.info("%d prompts answered with %d tokens in %.2f s: %.1f tokens/s",
                      len(ready), tokens, seconds, tokens / seconds)
        self.conclude(stage, seconds, work | {"answers": len(outputs)}, micro_batches=plan.depth)
        self._finish(outputs)
        return 0

    def _read(self) -> list[ReadyRequest]:
        """First rank: everything about the prompts and the output that can be checked before a weight is read."""
        check_output_path(self.args.output, self.args.overwrite)
        self.requests = read_requests(self.args.prompts, self.params)
        checkpoint = self.examine()
        tokenizer = load_tokenizer(checkpoint.path)
        ready, self.texts = prepare(self.requests, tokenizer, checkpoint.config, self.args.max_seq_len)
        return ready

    def _plan(self, ready: list[ReadyRequest]) -> BatchPlan:
        """How replicas batch; the cache is as large as the rank of least room of each replica allows."""
        args, shape = self.args, self.grid.shape
        at_once = min(args.max_seqs, -(-len(ready) // shape.data))
        pages = self.pages(args.kv_memory)
        with agreed(self.comm, "planning the KV cache"):
            check_pages(pages, ready, args.kv_memory is not None)
        budget = min(args.token_budget, at_once * longest(ready))
        depth = args.micro_batches or shape.pipeline
        prefill = args.prefill_micro_batch or (budget if depth == 1 else PREFILL)
        return BatchPlan(at_once, depth, StepLimits(budget, min(prefill, budget), args.decode_micro_batch or 0),
                         min(pages, at_once * pages_of(longest(ready))), args.prefix_sharing)

    def _answer(self, stage: TransformerStage, plan: BatchPlan, ready: list[ReadyRequest], counters: SharedCounters,
                start: float, tick) -> tuple[list[Output], dict[str, int]]:
        """Outputs of this replica (on its leader, else none), and what this rank did."""
        grid, checkpoint = self.grid, self.checkpoint
        tokenizer = load_tokenizer(checkpoint.path) if grid.is_leader else None
        eos = frozenset(checkpoint.config.eos_token_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        def decode(ids) -> str:
            return tokenizer.decode(ids, continuation=True)
        queue = RequestQueue(by_cost(ready), counters, grid.data_index, grid.shape.data, plan.max_seqs)
        replica = Replica(grid, stage, ready, plan, queue, counters, eos, decode if tokenizer else None, start, tick)
        return replica.run(), replica.work()

    def _finish(self, outputs: list[Output]) -> None:
        gathered, hashes = self.comm.gather(outputs), self.comm.gather(self.hashes)
        if self.first:
            self.facts["seed"] = self.params.seed
            if self.hashes is not None:
                self.facts["weights_sha256"] = {name: value for part in hashes for name, value in (part or {}).items()}
            outputs = [output for part in gathered for output in part]
        on_first(self.comm, self._write, outputs)

    def _write(self, outputs: list[Output]) -> None:
        digest = write_results(self.args.output, self.requests, self.texts, outputs, self.facts, overwrite=self.args.overwrite)
        _LOG.info("results in %s, digest %s", self.args.output, digest)
