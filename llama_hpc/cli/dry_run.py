"""``llama-hpc run --dry-run``: everything that a run checks and decides before it reads weights, and what it would need."""

import os
from dataclasses import replace

from mpi4py import MPI

from llama_hpc.cli.model_tables import fact_lines, model_facts, rank_lines
from llama_hpc.comm.pipeline import AHEAD
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.durable import Done
from llama_hpc.engine.job import Job
from llama_hpc.engine.layout import OVERHEAD, USABLE, RankShare, rank_shares
from llama_hpc.engine.prepare import longest, outputs_of
from llama_hpc.engine.replica import BatchPlan
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.sizes import buffer_bytes
from llama_hpc.runtime.abort import on_first
from llama_hpc.runtime.binding import launch_table, launch_warnings
from llama_hpc.runtime.devices import memory_of
from llama_hpc.runtime.tables import size


class DryRun(Job):
    """A ``Job`` that ends where weights would be read. It raises what the job would raise, and prints the rest.

    Under mpirun it is about the ranks that there are, else about ``args.ranks`` or those of the grid, of this node's memory or
    ``args.memory`` bytes each.
    """

    def run(self) -> int:
        ready, done, complete = on_first(self.comm, self.read)
        if not complete:
            self.open()
            self.outputs = outputs_of(ready)
            self.choose_shape(*self.grid_sizes(ready))
            plan = self.plan(ready)
            places = self.comm.gather(self.binding)
        if self.first:
            print("\n".join(fact_lines(self._checks(ready, done))))
            if not complete:
                self._show(ready, plan, places)
        return 0

    def resources(self) -> tuple[int, int, int]:
        ranks, per_node, memory = super().resources()
        if ranks == 1:
            ranks = per_node = self.args.ranks or (self.settings.shape.size if self.settings.shape else 1)
            memory = memory_of(self.device, ranks)
        else:
            ranks -= self.args.spares
        return ranks, per_node, self.args.memory or memory

    def _checks(self, ready: list[ReadyRequest], done: Done) -> list[tuple[str, str]]:
        args, samples, runs = self.args, sum(request.params.n for request in ready), len(self.durable.found.runs)
        lengths, limit = [len(request.prompt) for request in ready], max(request.limit for request in ready)
        replaced = ", which is replaced" if os.path.exists(args.output) else ""
        progress = "nothing to go on with: the job begins"
        if self.durable.complete:
            progress = "complete: nothing is left to do"
        elif runs:
            torn = f", {self.durable.found.torn} bytes of half written ones are cut off" if self.durable.found.torn else ""
            progress = f"{len(done)} of {samples} answers are there, of {runs} runs{torn}: the job goes on"
        elif args.overwrite and self.durable.folder.parts:
            progress = "that of an unfinished run is given up (--overwrite): the job begins"
        asked = f"{len(ready)} prompts of {min(lengths)} to {max(lengths)} tokens, {samples} answers of up to {limit}"
        return [("prompts", f"{args.prompts}: {asked}"), ("output", f"{args.output} can be written{replaced}"),
                ("progress", progress)]

    def _show(self, ready: list[ReadyRequest], plan: BatchPlan, places: list) -> None:
        shape, limits = self.shape, plan.limits
        steps = f"{plan.depth} under way at a time, " if plan.depth > 1 else ""
        decoding = f"{limits.decode} decoding sequences" if limits.decode else "an equal share of the decoding sequences"
        facts = [("sequences", f"{plan.max_seqs} at a time in a replica, of up to {longest(ready)} tokens"),
                 ("steps", f"{steps}each of up to {limits.token_budget} tokens, {limits.prefill} of prompts, and {decoding}"),
                 ("KV cache", f"{self.kv_cache}, {plan.pages} pages of {PAGE} tokens in a replica")]
        print("\n".join(["", *fact_lines(model_facts(self.checkpoint, self.weights)), "", *fact_lines(facts), ""]))
        print(f"grid {shape} (replicas x stages x tensor ranks), a rank may use {size(USABLE * self.memory)} of "
              f"{size(self.memory)}; what one replica's hold, at most:\n")
        print("\n".join(self._ranks(plan, longest(ready))))
        print(f"\nin all also some {size(OVERHEAD)} of each rank for the interpreter, libraries and compiled code\n")
        if self.comm.size < shape.size:
            gpus = "" if self.args.device == "cpu" else ", and their GPUs"
            print(f"{shape.size} ranks are assumed; under mpirun or srun a dry run also checks where they are{gpus}")
            return
        print("\n".join(launch_table(places)))
        for line in launch_warnings(places, MPI.Get_library_version()):
            print(f"warning: {line}")

    def _ranks(self, plan: BatchPlan, max_seq_len: int) -> list[str]:
        """The table of one replica's ranks."""
        config, shape, context = self.checkpoint.config, self.shape, self.settings.context_parallel
        def buffers(rank: RankShare) -> int:
            rows, outer = plan.limits.token_budget, shape.pipeline > 1
            messages = AHEAD * (rank.stage_index > 0) + plan.depth * (rank.stage_index < shape.pipeline - 1)
            return outer * messages * 4 * rows * config.hidden_size + buffer_bytes(
                config, self.weights, rank.stage, rank.share, rows=rows, outputs=plan.max_seqs, max_seq_len=max_seq_len,
                threads=self.threads, joined=shape.tensor > 1)
        # Of each a page, in its part of the cache.
        ranks = rank_shares(config, self.weights, replace(shape, data=1), PAGE, self.kv_cache, context, self.cut.stages)
        ranks = [replace(rank, cache=rank.cache * (plan.pages // context)) for rank in ranks]
        held = [buffers(rank) for rank in ranks]
        return rank_lines(ranks, {}, {"buffers": [size(count) for count in held],
                                      "total": [size(r.weights + r.cache + count) for r, count in zip(ranks, held, strict=True)]})
