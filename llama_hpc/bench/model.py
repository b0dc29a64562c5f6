"""Speed of a whole model in one process: one sequence, a prompt, a batch; alone, or in alternation with llama.cpp."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.bench.cases import CHUNK, Case, rows_of
from llama_hpc.bench.peer import PeerModel
from llama_hpc.bench.products import Probes
from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.faults import error_of
from llama_hpc.model.kv_cache import bytes_per_position
from llama_hpc.model.shares import layer_parameters
from llama_hpc.model.sizes import whole
from llama_hpc.model.transformer import Batch, StageWeights, TransformerStage


@dataclass(frozen=True)
class Speed:
    """One case: medians over rounds of seconds and rates, and of the shares of what the probes reached in the same round.

    GB/s are those of the weights, once for each step; operations are those of the products.
    """

    model: str
    weights: str
    kv_cache: str
    case: str
    threads: int
    seconds: float
    tokens_per_second: float
    gigabytes_per_second: float
    bandwidth_share: float
    operations_per_second: float
    peak_share: float
    weight_bytes: int
    cache_bytes: int

    def as_row(self) -> tuple[str, ...]:
        return (self.case, self.weights, str(self.threads), f"{self.tokens_per_second:.1f}", f"{self.gigabytes_per_second:.1f}",
                f"{self.bandwidth_share:.3f}", f"{self.operations_per_second / 1e9:.0f}", f"{self.peak_share:.3f}",
                f"{self.weight_bytes / 1e6:.0f}", f"{self.cache_bytes / 1e6:.0f}")


TITLES = ("case", "weights", "threads", "tokens/s", "GB/s", "of bandwidth", "Gop/s", "of peak", "weights MB", "KV cache MB")


@dataclass(frozen=True)
class Ratio:
    """One case against one format of llama.cpp: medians of both rates, and the median, least and greatest ratio of a round."""

    model: str
    weights: str
    kv_cache: str
    case: str
    threads: int
    peer_format: str
    tokens_per_second: float
    peer_tokens_per_second: float
    ratio: float
    lowest: float
    highest: float
    weight_bytes: int
    peer_bytes: int

    def as_row(self) -> tuple[str, ...]:
        return (self.case, self.weights, str(self.threads), f"{self.tokens_per_second:.1f}", self.peer_format,
                f"{self.peer_tokens_per_second:.1f}", f"{self.ratio:.2f}", f"{self.lowest:.2f}", f"{self.highest:.2f}",
                f"{self.peer_bytes / 1e6:.0f}")


PEER_TITLES = ("case", "weights", "threads", "tokens/s", "llama.cpp", "its tokens/s", "ratio", "lowest", "highest", "file MB")


class ModelBenchmark:
    """A model's weights on one pool, with room for some cases. ``kv_cache``: the cache's format, None for that of the weights."""

    def __init__(self, name: str, weights_format: str, config: ModelConfig, weights: StageWeights, pool: Pool, timed: list[Case],
                 kv_cache: str | None = None):
        self.name, self.format, self.config, self.weights, self.pool = name, weights_format, config, weights, pool
        self.kv_cache = kv_cache or weights.kv_cache
        sequences, length = max(case.batch for case in timed), max(case.length for case in timed)
        self.stage = TransformerStage(config, *whole(config), weights, TensorReducer(MPI.COMM_SELF), pool, sequences=sequences,
                                      max_seq_len=length, max_rows=max(CHUNK, sequences), max_outputs=sequences,
                                      kv_cache=self.kv_cache)
        self.probes = Probes(pool, weights.quantized)
        self._rng = np.random.default_rng(0)

    def measure(self, case: Case, rounds: int, rivals: list[PeerModel]) -> tuple[Speed, list[Ratio]]:
        """Ours alone, or before each of llama.cpp's formats, in every round. Raises NumericsError, and as ``Peer`` does."""
        found, pairs = [], {rival.format: [] for rival in rivals}
        size, operations = self._work(case)
        for _ in range(rounds):
            bandwidth, peak = self.probes.bandwidth(), self.probes.peak()
            for rival in rivals or [None]:
                seconds = self.seconds(case)
                found.append((seconds, case.batch * case.tokens / seconds, size / seconds / 1e9, size / seconds / bandwidth,
                              operations / seconds, operations / seconds / peak))
                if rival:
                    pairs[rival.format].append((found[-1][1], _peer_rate(case, rival, self.pool.threads)))
        who = self.name, self.format, self.kv_cache, str(case), self.pool.threads
        speed = Speed(*who, *map(statistics.median, zip(*found, strict=True)), self.weights.nbytes, self._cache_bytes(case))
        return speed, [self._ratio(who, rival, pairs[rival.format]) for rival in rivals]

    def seconds(self, case: Case) -> float:
        """Wall time of a case, after one step of it to warm up. Raises NumericsError for a fault."""
        for first in range(0, case.prompt, CHUNK // case.batch or 1):
            self.stage.forward(self._batch(case, range(first, min(first + (CHUNK // case.batch or 1), case.prompt)), 0))
        batches = [self._batch(case, *step) for step in case.steps()]
        self.stage.forward(batches[0])
        start = time.perf_counter()
        for batch in batches:
            self.stage.forward(batch)
        taken = time.perf_counter() - start
        if self.stage.faults.code:
            raise error_of(self.stage.faults.code)
        return taken

    def _batch(self, case: Case, positions: range, outputs: int) -> Batch:
        """These positions of every sequence, with random tokens."""
        each = len(positions)
        rows = each * case.batch
        tokens, sequences, where = rows_of(case, positions, self.config.vocab_size, self._rng)
        return Batch(rows, tokens, sequences, where, np.arange(each - 1, rows, each)[:outputs])

    def _work(self, case: Case) -> tuple[int, int]:
        """Bytes of weights that are read, and operations of products."""
        head = self.weights.head.nbytes
        parts = [(layer.attention, layer.mlp) for layer in self.weights.layers]
        layers = sum(w.nbytes for a, m in parts for w in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down))
        rows = sum(case.batch * len(positions) for positions, _ in case.steps())
        outputs = [count for _, count in case.steps()]
        size = len(outputs) * layers + head * sum(count > 0 for count in outputs)
        per_row = layer_parameters(self.config) * self.config.num_layers
        return size, 2 * (rows * per_row + sum(outputs) * self.config.vocab_size * self.config.hidden_size)

    def _cache_bytes(self, case: Case) -> int:
        each = bytes_per_position(self.config.head_dim, self.config.kv_heads, self.config.num_layers, self.stage.cache.dtype)
        return each * case.batch * case.length

    def _ratio(self, who: tuple, rival: PeerModel, pairs: list[tuple[float, float]]) -> Ratio:
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        return Ratio(*who, rival.format, ours, theirs, statistics.median(ratios), min(ratios), max(ratios), self.weights.nbytes,
                     rival.path.stat().st_size)


def _peer_rate(case: Case, model: PeerModel, threads: int) -> float:
    """Tokens a second of llama.cpp."""
    if case.name == "batch":
        return model.peer.batched(model.path, threads, case.batch, case.prompt, case.tokens)
    return (model.peer.prefill if case.name == "prefill" else model.peer.decode)(model.path, threads, case.tokens)
