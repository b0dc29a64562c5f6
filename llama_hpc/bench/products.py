"""Speed of the products against the machine's own limits, measured in alternation on the same threads."""

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np

from llama_hpc.kernels.codebook import start_codebook
from llama_hpc.kernels.cpu import matmul, probes
from llama_hpc.kernels.cpu.weights import allocate
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import BLOCK
from llama_hpc.model.linear import Activation

PROBE_BYTES = 256 << 20
FRESH_BYTES = 192 << 20         # weights walked through, so that each product reads its own from memory


@dataclass(frozen=True)
class Measurement:
    """One product: medians over rounds of its seconds and of its shares of what the probes reached in the same round."""

    weights: str
    columns: int
    rows: int
    tokens: int
    threads: int
    seconds: float
    gigabytes_per_second: float
    bandwidth_share: float
    operations_per_second: float
    peak_share: float

    def as_row(self) -> tuple[str, ...]:
        return (self.weights, f"{self.columns}x{self.rows}", str(self.tokens), str(self.threads), f"{self.seconds * 1e6:.0f}",
                f"{self.gigabytes_per_second:.1f}", f"{self.bandwidth_share:.2f}", f"{self.operations_per_second / 1e9:.0f}",
                f"{self.peak_share:.2f}")


TITLES = ("weights", "KxN", "tokens", "threads", "us", "GB/s", "of bandwidth", "Gop/s", "of peak")


def measure(weights_format: str, columns: int, rows: int, tokens: int, threads: int, rounds: int = 7) -> Measurement:
    """Times the product of ``tokens`` tokens with random weights [rows, columns], as many of them as exceed the caches."""
    blocks, rng = Blocks(columns, BLOCK), np.random.default_rng(0)
    copies = [random_weights(weights_format, rows, blocks, rng)]
    while len(copies) * copies[0].nbytes < FRESH_BYTES:
        copies.append(random_weights(weights_format, rows, blocks, rng))
    x = Activation(rng.standard_normal((tokens, columns), np.float32), BLOCK, weights_format != "f32")
    assert x.prepare(tokens) == 0
    sums = np.zeros((tokens, matmul.tiles(rows) * matmul.LANES), np.int64)
    words = np.ones(PROBE_BYTES // 8, np.int64)
    def product() -> None:
        for weights in copies:
            matmul.matmul(x.operand, x.scales, weights, sums, tokens, threads, x.corrections)
    product()
    probes.read_memory(words, threads)
    steps = _calibrate(threads)
    found = []
    for _ in range(rounds):
        bandwidth = words.nbytes / _seconds(lambda: probes.read_memory(words, threads))
        start = time.perf_counter()
        peak = probes.arithmetic(steps, threads) / (time.perf_counter() - start)
        seconds = _seconds(product) / len(copies)
        rate, speed = copies[0].nbytes / seconds, 2 * tokens * rows * columns / seconds
        found.append((seconds, rate / 1e9, rate / bandwidth, speed, speed / peak))
    return Measurement(weights_format, columns, rows, tokens, threads, *map(statistics.median, zip(*found, strict=True)))


def random_weights(weights_format: str, rows: int, blocks: Blocks, rng):
    """Weights of random bits, made without quantising anything."""
    weights = allocate(weights_format, rows, blocks, start_codebook(110) if weights_format == "q3_5" else None)
    for name in ("codes", "indices", "values"):
        array = getattr(weights, name, None)
        if array is not None:
            raw = array.reshape(-1).view(np.uint8)
            raw[:] = np.frombuffer(rng.bytes(raw.size), np.uint8) if array.dtype == np.int8 else 0
    weights.row_scales[:] = np.float32(1e-6)
    return weights


def as_json(measurements: list[Measurement]) -> list[dict]:
    return [asdict(m) for m in measurements]


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _calibrate(threads: int) -> int:
    """Steps of the arithmetic probe that take about 20 ms."""
    probes.arithmetic(1, threads)
    steps = 100_000
    return max(steps, int(steps * 0.02 / _seconds(lambda: probes.arithmetic(steps, threads))))
