"""Speed of the products against the machine's own limits, measured in alternation on the same threads."""

import statistics
import time
from dataclasses import dataclass

import numpy as np

from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.kernels.cpu import products
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, add_quantize
from llama_hpc.kernels.cpu.places import cache_sizes
from llama_hpc.kernels.cpu.probes import arithmetic, read_memory
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.kernels.cpu.weights import Weights
from llama_hpc.kernels.cpu.workers import Pool, WorkDistribution
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import BLOCK

PROBE_BYTES = 256 << 20
FRESH_BYTES = 192 << 20         # weights walked through, at least, so that each product reads its own from memory
MOST_COPIES = 1024              # of small weights
PROBE_SECONDS = 0.02


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
                f"{self.seconds * 1e6:.0f}", f"{self.gigabytes_per_second:.1f}", f"{self.bandwidth_share:.3f}",
                f"{self.operations_per_second / 1e9:.0f}", f"{self.peak_share:.3f}")


TITLES = ("weights", "KxN", "tokens", "threads", "schedule", "us", "GB/s", "of bandwidth", "Gop/s", "of peak")


class Probes:
    """What a pool reaches in reading memory, and in the arithmetic of registers, each time that it is asked."""

    def __init__(self, pool: Pool, quantized: bool):
        self._words = np.ones(PROBE_BYTES // 8, np.int64)
        self._reading = read_memory(pool, self._words)
        steps = 10_000
        steps = max(steps, int(steps * PROBE_SECONDS / seconds_of(arithmetic(pool, steps, quantized)[0].run)))
        self._computing, self._operations = arithmetic(pool, steps, quantized)

    def bandwidth(self) -> float:
        """Bytes a second."""
        return self._words.nbytes / seconds_of(self._reading.run)

    def peak(self) -> float:
        """Operations a second; a multiply-add counts as two."""
        return self._operations / seconds_of(self._computing.run)


class Products:
    """Products with random weights [rows, columns] of a format, as many of them as exceed the caches."""

    def __init__(self, weights_format: str, columns: int, rows: int):
        self.format, self.columns, self.rows = weights_format, columns, rows
        random, blocks = RandomWeights(), Blocks(columns, BLOCK)
        first = random.matrix(weights_format, rows, blocks)
        self.copies = [first] + [random.matrix(weights_format, rows, blocks) for _ in range(1, copies_of(first))]
        self._bits: dict[int, np.ndarray] = {}

    def measure(self, tokens: int, pool: Pool, schedule: str, rounds: int) -> Measurement:
        """The product of ``tokens`` tokens. Raises BenchmarkError where its bits are others than those of an earlier call."""
        program, out = product_program(self.copies, activations(tokens, self.columns), pool, schedule)
        probes = Probes(pool, self.copies[0].quantized)
        self._check(checked_run(program, out), schedule, pool.threads)
        size, found = self.copies[0].nbytes, []
        for _ in range(rounds):
            bandwidth, peak = probes.bandwidth(), probes.peak()
            seconds = seconds_of(program.run) / len(self.copies)
            speed = 2 * tokens * self.rows * self.columns / seconds
            found.append((seconds, size / seconds / 1e9, size / seconds / bandwidth, speed, speed / peak))
        return Measurement(self.format, self.columns, self.rows, tokens, pool.threads, schedule,
                           *map(statistics.median, zip(*found, strict=True)))

    def _check(self, out: np.ndarray, schedule: str, threads: int) -> None:
        expected = self._bits.setdefault(len(out), out.view(np.int32).copy())
        if not np.array_equal(out.view(np.int32), expected):
            raise BenchmarkError(f"the product of {len(out)} tokens with {self.format} weights {self.columns}x{self.rows} has "
                                 f"other bits with schedule {schedule} on {threads} threads than before")


def copies_of(weights: Weights) -> int:
    """How many matrices of this size exceed the caches, or MOST_COPIES."""
    return min(MOST_COPIES, -(-max(FRESH_BYTES, 2 * cache_sizes().l3) // weights.nbytes))


def activations(tokens: int, columns: int) -> np.ndarray:
    """Normal float32 [tokens, columns]."""
    return np.random.default_rng(1).standard_normal((tokens, columns), np.float32)


def product_program(copies: list[Weights], x: np.ndarray, pool: Pool, schedule: str) -> tuple[Program, np.ndarray]:
    """The products of x with each of some weights, one operation each, and where they put their results, float32 [tokens, rows].

    x is quantised here, once.
    """
    tokens, columns = np.array([len(x)]), x.shape[1]
    activation = Activation(*x.shape, copies[0].blocks.block, copies[0].quantized)
    activation.values[:] = x
    if copies[0].quantized:
        first = Program(pool)
        add_quantize(first, "x", activation, tokens)
        first.run()
    program, out = Program(pool), np.zeros((len(x), copies[0].rows), np.float32)
    work = WorkDistribution.for_matmul(copies[0].rows, columns, schedule)
    for weights in copies:
        add_product(program, "product", activation, [weights.part(out)], weights.layout, tokens, products.FLOAT, work)
    return program, out


def checked_run(program: Program, out: np.ndarray) -> np.ndarray:
    """Runs a program once; returns ``out``. Raises BenchmarkError where a kernel finds a value out of range."""
    if program.run() >= 0:
        raise BenchmarkError("a product of random weights was out of range")
    return out


def seconds_of(function) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
