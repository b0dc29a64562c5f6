"""What ``llama-hpc bench`` does, from its options to measurements in a report and tables on the terminal."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_hpc.bench import model as model_bench
from llama_hpc.bench import products, schedules
from llama_hpc.bench.cases import Case, cases
from llama_hpc.bench.peer import Peer, PeerModel, peer_models, random_gguf
from llama_hpc.bench.report import Report
from llama_hpc.bench.shapes import shape_config
from llama_hpc.bench.table import print_row
from llama_hpc.errors import UsageError
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.model.kv_cache import cache_format
from llama_hpc.model.random_weights import random_stage
from llama_hpc.model.sizes import whole
from llama_hpc.model.transformer import StageWeights
from llama_hpc.weights.checkpoint import Checkpoint, open_checkpoint, weights_format


def measure_products(args: argparse.Namespace, report: Report) -> None:
    """``bench kernels``: every format, shape, token count, thread count and schedule."""
    print_row(products.TITLES)
    for weights in args.weights:
        for columns, rows in args.shapes:
            bench = products.Products(weights, columns, rows)
            for tokens in args.tokens:
                for threads in args.threads:
                    for schedule in args.schedules:
                        found = bench.measure(tokens, shared_pool(threads), schedule, args.rounds)
                        report.add("products", found)
                        print_row(found.as_row())


def compare_schedules(args: argparse.Namespace, report: Report) -> None:
    """``bench kernels --compare``: every format, shape and token count; schedules on the most threads."""
    print_row(schedules.TITLES)
    for weights in args.weights:
        for columns, rows in args.shapes:
            comparison = schedules.ScheduleComparison(weights, columns, rows)
            for tokens in args.tokens:
                for found in comparison.measure(tokens, max(args.threads), args.rounds):
                    report.add("schedules", found)
                    print_row(found.as_row())


class _Source:
    """Where a model comes from: a checkpoint, or a shape alone."""

    def __init__(self, args: argparse.Namespace):
        if (args.model is None) == (args.shape is None):
            raise UsageError("bench model needs either a MODEL or --shape")
        if args.layers and not args.shape:
            raise UsageError("--layers is for --shape; a MODEL is timed as it is")
        self.checkpoint: Checkpoint | None = None
        if args.shape:
            self.config, self.name, self.formats = shape_config(args.shape, args.layers), args.shape, args.weights or ["q3_5"]
            return
        self.checkpoint, self.name = open_checkpoint(args.model), args.model
        self.config = self.checkpoint.config
        own = getattr(self.checkpoint, "weights", "q3_5")
        self.formats = [weights_format(self.checkpoint, asked) for asked in args.weights or [own]]

    def load(self, weights: str, threads: int) -> StageWeights:
        """All weights in a format."""
        if self.checkpoint is None:
            return random_stage(self.config, weights, *whole(self.config), RandomWeights())
        from mpi4py import MPI

        from llama_hpc.comm.reduce import TensorReducer
        from llama_hpc.weights.loader import load_stage
        alone = MPI.COMM_SELF
        return load_stage(self.checkpoint, weights, *whole(self.config), TensorReducer(alone), alone, threads=threads)

    def gguf(self, folder: Path) -> Path:
        """A GGUF file of the model, or of random weights in its shape. Raises UsageError for a MODEL of another format."""
        if self.checkpoint is None:
            return random_gguf(self.config, self.name, folder)
        if self.checkpoint.path.suffix.lower() != ".gguf":
            raise UsageError(f"--peer: llama.cpp cannot read {self.checkpoint.path}; give a GGUF file, or --shape")
        return self.checkpoint.path


def measure_models(args: argparse.Namespace, report: Report) -> None:
    """``bench model``: every weight format, thread count and case, with ``--peer`` against every format of llama.cpp."""
    source, timed = _Source(args), cases(args.cases, args.tokens, args.prompt, args.batch)
    longest = max(case.length for case in timed)
    if longest > source.config.context_length:
        raise UsageError(f"{longest} tokens are more than the model's context of {source.config.context_length}; "
                         "lower --prompt or --tokens")
    with _rivals(args, source) as rivals:
        for weights in source.formats:
            start = time.perf_counter()
            stage = source.load(weights, max(args.threads))
            print(f"\n{source.name}, {source.config.num_layers} layers, {weights}: {stage.nbytes / 1e6:.0f} MB of weights, ready "
                  f"after {time.perf_counter() - start:.1f} s; KV cache in {cache_format(args.kv_cache, weights)}\n")
            _measure_model(args, report, source, weights, stage, timed, rivals)


def _measure_model(args: argparse.Namespace, report: Report, source: _Source, weights: str, stage: StageWeights,
                   timed: list[Case], rivals: list[PeerModel]) -> None:
    ratios = []
    print_row(model_bench.TITLES)
    for threads in args.threads:
        bench = model_bench.ModelBenchmark(source.name, weights, source.config, stage, shared_pool(threads), timed,
                                           cache_format(args.kv_cache, weights))
        for case in timed:
            speed, found = bench.measure(case, args.rounds, rivals)
            report.add("models", speed)
            print_row(speed.as_row())
            ratios.append(found)
    if not rivals:
        return
    print()
    print_row(model_bench.PEER_TITLES)
    for found in ratios:
        for ratio in found:
            report.add("ratios", ratio)
            print_row(ratio.as_row())
    print()
    for found in ratios:
        best = max(found, key=lambda ratio: ratio.peer_tokens_per_second)
        print(f"{best.case}, threads {best.threads}: {best.ratio:.2f} x llama.cpp in its fastest format here, {best.peer_format}")


@contextmanager
def _rivals(args: argparse.Namespace, source: _Source) -> Iterator[list[PeerModel]]:
    """llama.cpp's models; in a folder that is deleted afterwards, unless one was named."""
    if args.peer is None:
        yield []
        return
    peer = Peer(args.peer, environment=args.environment)
    with tempfile.TemporaryDirectory(prefix="llama_hpc-peer-") as temporary:
        folder = Path(args.peer_models or temporary)
        print(f"making models of llama.cpp in {folder}", flush=True)
        yield peer_models(peer, source.gguf(folder), list(dict.fromkeys(args.peer_formats)), folder)
