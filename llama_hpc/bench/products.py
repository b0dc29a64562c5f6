"""Speed of the products against the machine's own limits, measured in alternation on the same threads."""

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np

from llama_hpc.kernels.codebook import start_codebook
from llama_hpc.kernels.cpu import products
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, add_quantize
from llama_hpc.kernels.cpu.probes import arithmetic, read_memory
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.weights import Weights, allocate
from llama_hpc.kernels.cpu.workers import Pool, WorkDistribution
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import BLOCK

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
    schedule: str
    seconds: float
    gigabytes_per_second: float
    bandwidth_share: float
    operations_per_second: float
    peak_share: float

    def as_row(self) -> tuple[str, ...]:
        return (self.weights, f"{self.columns}x{self.rows}", str(self.tokens), str(self.threads), self.schedule,
                f"{self.seconds * 1e6:.0f}", f"{self.gigabytes_per_second:.1f}", f"{self.bandwidth_share:.2f}",
                f"{self.operations_per_second / 1e9:.0f}", f"{self.peak_share:.2f}")


TITLES = ("weights", "KxN", "tokens", "threads", "schedule", "us", "GB/s", "of bandwidth", "Gop/s", "of peak")


def measure(weights_format: str, columns: int, rows: int, tokens: int, pool: Pool, schedule: str = "dynamic", rounds: int = 7
            ) -> Measurement:
    """Times the product of ``tokens`` tokens with random weights [rows, columns], as many of them as exceed the caches."""
    blocks, rng = Blocks(columns, BLOCK), np.random.default_rng(0)
    copies = [random_weights(weights_format, rows, blocks, rng)]
    while len(copies) * copies[0].nbytes < FRESH_BYTES:
        copies.append(random_weights(weights_format, rows, blocks, rng))
    run = product_program(copies, rng.standard_normal((tokens, columns), np.float32), pool, schedule).run
    words = np.ones(PROBE_BYTES // 8, np.int64)
    reading = read_memory(pool, words)
    quantized = copies[0].quantized
    computing, operations = arithmetic(pool, _calibrated(pool, quantized), quantized)
    run()
    found = []
    for _ in range(rounds):
        bandwidth, peak = words.nbytes / _seconds(reading.run), operations / _seconds(computing.run)
        seconds = _seconds(run) / len(copies)
        rate, speed = copies[0].nbytes / seconds, 2 * tokens * rows * columns / seconds
        found.append((seconds, rate / 1e9, rate / bandwidth, speed, speed / peak))
    return Measurement(weights_format, columns, rows, tokens, pool.threads, schedule, *map(statistics.median, zip(*found, strict=True)))


def product_program(copies: list[Weights], x: np.ndarray, pool: Pool, schedule: str) -> Program:
    """The products of x with each of some weights, one operation each; x is quantised here, once."""
    tokens, columns = np.array([len(x)]), x.shape[1]
    activation = Activation(*x.shape, BLOCK, copies[0].quantized)
    activation.values[:] = x
    if copies[0].quantized:
        first = Program(pool)
        add_quantize(first, "x", activation, tokens)
        first.run()
    program, out = Program(pool), np.zeros((len(x), copies[0].rows), np.float32)
    work = WorkDistribution.for_matmul(copies[0].rows, columns, schedule)
    for weights in copies:
        add_product(program, "product", activation, [weights.part(out)], weights.layout, tokens, products.FLOAT, work)
    return program


def random_weights(weights_format: str, rows: int, blocks: Blocks, rng) -> Weights:
    """Weights of random bits, made without quantising anything; float16 factors of ``q8`` and ``q4`` are tiny."""
    weights = allocate(weights_format, rows, blocks, start_codebook(110) if weights_format == "q3_5" else None)
    raw = weights.data.reshape(-1).view(np.uint8)
    if weights.layout in ("codes", "bytes"):
        raw[:] = np.frombuffer(rng.bytes(raw.size), np.uint8)
        weights.row_scales[:] = np.float32(1e-6)
    return weights


def as_json(measurements: list[Measurement]) -> list[dict]:
    return [asdict(m) for m in measurements]


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _calibrated(pool: Pool, quantized: bool) -> int:
    """Steps of the arithmetic probe that take about 20 ms."""
    steps = 10_000
    return max(steps, int(steps * 0.02 / _seconds(arithmetic(pool, steps, quantized)[0].run)))
