"""Speed of products on a GPU, against a copy of its memory and against cuBLAS, all in one run."""

import statistics
from dataclasses import dataclass

import numpy as np

from llama_hpc.bench import cublas
from llama_hpc.bench.device_probes import Captured, DeviceProbes, copies_for, target_cells
from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.kernels.cuda import products
from llama_hpc.kernels.cuda.activations import Activation, quantize_rows
from llama_hpc.kernels.cuda.products import Part, Scratch
from llama_hpc.kernels.cuda.random_weights import RandomDeviceWeights
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import BLOCK

ONE_TARGET, MANY_TARGET = 0.8, 0.5      # of the copy's bandwidth with one token; of cuBLAS's bfloat16 with 1,024
_LARGE = 8192 * 8192                    # weights from which one token has a target: smaller products are over too soon
_MANY = 1024


@dataclass(frozen=True)
class ProductSpeed:
    """One product on a GPU: medians over rounds of seconds and of shares of what a copy reached in the same round; shares of what
    cuBLAS reaches, 0 where it is absent. ``target`` is for the share of the copy with one token, else for that of bfloat16."""

    device: str
    weights: str
    columns: int
    rows: int
    tokens: int
    seconds: float
    gigabytes_per_second: float
    copy_share: float
    operations_per_second: float
    bf16_share: float
    int8_share: float
    target: float

    @property
    def share(self) -> float:
        """What the target is for."""
        return self.copy_share if self.tokens == 1 else self.bf16_share

    @property
    def claim(self) -> str:
        """What the share is, in words."""
        return (f"product of {self.tokens} token{'s' * (self.tokens > 1)}, {self.weights} {self.columns}x{self.rows}, of "
                f"{'the bandwidth of copies' if self.tokens == 1 else 'cuBLAS bf16'}")

    def as_row(self) -> tuple[str, ...]:
        shares = (f"{share:.3f}" if share else "-" for share in (self.bf16_share, self.int8_share))
        return (self.weights, f"{self.columns}x{self.rows}", str(self.tokens), f"{self.seconds * 1e6:.1f}",
                f"{self.gigabytes_per_second:.0f}", f"{self.copy_share:.3f}", f"{self.operations_per_second / 1e12:.1f}", *shares,
                *target_cells(self.share, self.target))


TITLES = ("weights", "KxN", "tokens", "us", "GB/s", "of copy", "Top/s", "of bf16", "of int8", "target", "")


class DeviceProducts:
    """Products with random weights [rows, columns] of a format, as many of them as exceed the cache."""

    def __init__(self, device, probes: DeviceProbes, weights_format: str, columns: int, rows: int):
        self.device, self.probes, self.format, self.columns, self.rows = device, probes, weights_format, columns, rows
        random, blocks = RandomDeviceWeights(device), Blocks(columns, BLOCK)
        first = random.matrix(weights_format, rows, blocks)
        copies = copies_for(device, first.nbytes)
        self._weights = [first] + [random.matrix(weights_format, rows, blocks) for _ in range(1, copies)]
        self._scratch = Scratch(device, rows)

    def measure(self, tokens: int, rounds: int, rivals: dict[str, float]) -> ProductSpeed:
        """``rivals``: operations a second of cuBLAS (see ``rivals_of``). Raises BenchmarkError where a value is out of range."""
        device, first = self.device, self._weights[0]
        count, status = (device.upload(np.array([value], np.int32)) for value in (tokens, 0))
        x = Activation(device, tokens, self.columns, BLOCK, first.quantized)
        device.upload(np.random.default_rng(1).standard_normal((tokens, self.columns), np.float32), x.values)
        if first.quantized:
            quantize_rows(device, x, count, tokens, status)
        out = device.zeros((tokens, self.rows), np.float32)
        recorded = Captured(device, *(self._launch(x, Part(w, out), count, tokens, status) for w in self._weights))
        if device.download(status)[0]:
            raise BenchmarkError("a product of random weights was out of range")
        found = []
        for _ in range(rounds):
            bandwidth = self.probes.bandwidth()
            seconds = recorded.seconds() / len(self._weights)
            found.append((seconds, first.nbytes / seconds / 1e9, first.nbytes / seconds / bandwidth,
                          2 * tokens * self.rows * self.columns / seconds))
        seconds, gigabytes, share, speed = map(statistics.median, zip(*found, strict=True))
        shares = (speed / rivals[kind] if rivals.get(kind) else 0.0 for kind in cublas.KINDS)
        return ProductSpeed(device.name, self.format, self.columns, self.rows, tokens, seconds, gigabytes, share, speed, *shares,
                            target_of(tokens, self.columns * self.rows, bool(rivals.get("bf16"))))

    def _launch(self, x: Activation, part: Part, count, tokens: int, status):
        return lambda: products.product(self.device, x, [part], count, tokens, products.FLOAT, status, scratch=self._scratch)


def target_of(tokens: int, weights: int, compared: bool) -> float:
    """The share that is aimed at; 0 for none."""
    if tokens == 1:
        return ONE_TARGET if weights >= _LARGE else 0.0
    return MANY_TARGET if tokens >= _MANY and compared else 0.0


def rivals_of(device, probes: DeviceProbes, columns: int, rows: int, tokens: int) -> dict[str, float]:
    """Operations a second of cuBLAS for a product of this shape, in each type of numbers; none for one token."""
    if tokens == 1:
        return {}
    return {kind: cublas.operations_per_second(device, kind, columns, rows, tokens, probes.copy) for kind in cublas.KINDS}
