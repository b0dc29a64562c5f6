"""Speed of a whole model on a GPU: one sequence, a prompt, a batch, against what a copy of its memory allows."""

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from llama_hpc.bench.cases import Case, rows_of
from llama_hpc.bench.device_probes import DeviceProbes, target_cells
from llama_hpc.kernels.cuda.random_weights import RandomDeviceWeights
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.device_stage import DeviceStage
from llama_hpc.model.faults import error_of
from llama_hpc.model.whole_model import assemble, whole_stage
from llama_hpc.weights.layout import tensor_shapes

CHUNK = 1024                    # prompt tokens of a step
DECODE_TARGET = 0.6             # of the limit, with one sequence


@dataclass(frozen=True)
class DeviceSpeed:
    """One case: medians over rounds of seconds and rates. GB/s are those of the weights, once for each step, and of the keys and
    values that are read; ``limit_share`` is what a copy at full speed would take for these, of the time that it took; operations
    are those of the products."""

    device: str
    model: str
    layers: int
    weights: str
    kv_cache: str
    case: str
    seconds: float
    tokens_per_second: float
    gigabytes_per_second: float
    limit_share: float
    operations_per_second: float
    weight_bytes: int
    target: float

    @property
    def share(self) -> float:
        """What the target is for."""
        return self.limit_share

    @property
    def claim(self) -> str:
        """What the share is, in words."""
        return f"{self.model}, {self.layers} layers, {self.weights}, {self.case}, of what copies would take"

    def as_row(self) -> tuple[str, ...]:
        return (self.case, self.weights, self.kv_cache, f"{self.tokens_per_second:.1f}", f"{self.gigabytes_per_second:.0f}",
                f"{self.limit_share:.3f}", f"{self.operations_per_second / 1e12:.1f}", f"{self.weight_bytes / 1e6:.0f}",
                *target_cells(self.share, self.target))


TITLES = ("case", "weights", "KV cache", "tokens/s", "GB/s", "of limit", "Top/s", "weights MB", "target", "")


def random_weights(config: ModelConfig, weights_format: str, device) -> SimpleNamespace:
    """All weights of a model of this shape: random matrices, norms of ones, biases of zeros."""
    random, shapes = RandomDeviceWeights(device), tensor_shapes(config)

    def matrix(name: str, block: int, kind: str):
        rows, columns = shapes[name]
        return random.matrix(kind, rows, Blocks(columns, block))

    def vector(name: str) -> np.ndarray:
        return (np.zeros if name.endswith("_bias") else np.ones)(shapes[name], np.float32)
    return assemble(config, weights_format, matrix, vector)


class DeviceModel:
    """A model on one device, with room for some cases. ``kv_cache``: None for the format that suits the weights."""

    def __init__(self, name: str, weights_format: str, config: ModelConfig, weights, device, probes: DeviceProbes,
                 timed: list[Case], kv_cache: str | None = None):
        self.name, self.format, self.config, self.weights = name, weights_format, config, weights
        self.device, self.probes = device, probes
        self.kv_cache = kv_cache or weights.kv_cache
        sequences, length = max(case.batch for case in timed), max(case.length for case in timed)
        self.stage: DeviceStage = whole_stage(config, weights, device, sequences=sequences, max_seq_len=length,
                                              max_rows=max(min(CHUNK, length), sequences), kv_cache=self.kv_cache)
        layers = [linear.weights for layer in weights.layers for part in (layer.attention, layer.mlp)
                  for linear in vars(part).values() if hasattr(linear, "weights")]
        self._layers, self._head = sum(w.nbytes for w in layers), weights.head.weights.nbytes
        self._parameters = sum(w.rows * w.blocks.size for w in layers)
        self._rng = np.random.default_rng(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        embedding = self.weights.embedding.weights
        return self._layers + self._head + (0 if embedding is self.weights.head.weights else embedding.nbytes)

    def measure(self, case: Case, rounds: int) -> DeviceSpeed:
        """Raises NumericsError for a fault."""
        size, operations = self._work(case)
        self.seconds(case)      # steps are captured when they come for the first time
        found = []
        for _ in range(rounds):
            bandwidth, seconds = self.probes.bandwidth(), self.seconds(case)
            found.append((seconds, case.batch * case.tokens / seconds, size / seconds / 1e9, size / seconds / bandwidth,
                          operations / seconds))
        return DeviceSpeed(self.device.name, self.name, self.config.num_layers, self.format, self.kv_cache, str(case),
                           *map(statistics.median, zip(*found, strict=True)), self.nbytes,
                           DECODE_TARGET if case.name == "decode" else 0.0)

    def seconds(self, case: Case) -> float:
        """Wall time of a case. Raises NumericsError for a fault."""
        step = max(1, CHUNK // case.batch)
        for first in range(0, case.prompt, step):
            self.stage.forward(self._batch(case, range(first, min(first + step, case.prompt)), 0))
        batches = [self._batch(case, *step) for step in case.steps(CHUNK)]
        self.device.synchronize()
        start = time.perf_counter()
        for batch in batches:
            self.stage.forward(batch)
        taken = time.perf_counter() - start
        if self.stage.faults.code:
            raise error_of(self.stage.faults.code)
        return taken

    def _batch(self, case: Case, positions: range, outputs: int) -> SimpleNamespace:
        tokens, sequences, where = rows_of(case, positions, self.config.vocab_size, self._rng)
        each = len(positions)
        return SimpleNamespace(rows=len(tokens), tokens=tokens, sequences=sequences, positions=where,
                               outputs=np.arange(each - 1, len(tokens), each)[:outputs])

    def _work(self, case: Case) -> tuple[int, int]:
        """Bytes that are read, and operations of products."""
        cache, size, rows, outputs = self.stage.cache, 0, 0, 0
        a_position = cache.nbytes // (cache.own_count * PAGE)
        for positions, wanted in case.steps(CHUNK):
            size += self._layers + (self._head if wanted else 0) + case.batch * positions.stop * a_position
            rows, outputs = rows + case.batch * len(positions), outputs + wanted
        return size, 2 * (rows * self._parameters + outputs * self.config.vocab_size * self.config.hidden_size)
