"""Threads and schedules compared on one product: scalar code, the kernels on one thread, then every schedule on all threads."""

import statistics
from dataclasses import dataclass, replace

import numpy as np

from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.bench.products import activations, checked_run, copies_of, product_program, seconds_of
from llama_hpc.kernels.cpu.baseline import Baseline
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.random_weights import RandomWeights, copied, filled
from llama_hpc.kernels.cpu.team import SCHEDULES
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import BLOCK

BASELINE_PRODUCTS = 1 << 25     # weights x tokens of the scalar code: some hundredths of a second


@dataclass(frozen=True)
class Comparison:
    """One way to compute a product: median seconds, how often faster than scalar code, chunks handed out and stolen a product."""

    weights: str
    columns: int
    rows: int
    tokens: int
    threads: int
    code: str
    seconds: float
    operations_per_second: float
    speed_up: float
    tasks: float
    steals: float

    def as_row(self) -> tuple[str, ...]:
        return (self.weights, f"{self.columns}x{self.rows}", str(self.tokens), str(self.threads), self.code,
                f"{self.seconds * 1e6:.0f}", f"{self.operations_per_second / 1e9:.1f}", f"{self.speed_up:.1f}",
                f"{self.tasks:.1f}", f"{self.steals:.2f}")


TITLES = ("weights", "KxN", "tokens", "threads", "code", "us", "Gop/s", "speed-up", "tasks", "steals")


class ScheduleComparison:
    """The products of random weights [rows, columns] of a format, of which every copy holds the same."""

    def __init__(self, weights_format: str, columns: int, rows: int):
        self.format, self.columns, self.rows = weights_format, columns, rows
        blocks = Blocks(columns, BLOCK)
        self._plain = RandomWeights().rows(weights_format, rows, blocks)
        first = filled(weights_format, self._plain, blocks)
        self.copies = [first] + [copied(first, weights_format) for _ in range(1, copies_of(first))]

    def measure(self, tokens: int, threads: int, rounds: int) -> list[Comparison]:
        """All ways, in alternation; ``threads`` of the schedules. Raises BenchmarkError unless all give the same bits.

        The scalar code computes as many rows as it can in a moment; its seconds are those of all rows at this speed.
        """
        x = activations(tokens, self.columns)
        runs = [("SIMD", shared_pool(1), "static"), *((schedule, shared_pool(threads), schedule) for schedule in SCHEDULES)]
        programs = [product_program(self.copies, x, pool, schedule) for _, pool, schedule in runs]
        outs = [checked_run(*program).copy() for program in programs]
        held = min(self.rows, max(1, BASELINE_PRODUCTS // (tokens * self.columns)))
        baseline = Baseline(x, _first_rows(self._plain, held), BLOCK)
        self._check(baseline.run(), [("scalar", outs[0][:, :held])])
        self._check(outs[0], [(code, out) for (code, _, _), out in zip(runs, outs, strict=True)])
        times: list[list[float]] = [[] for _ in range(1 + len(runs))]
        counts = np.zeros((len(runs), 2))
        for _ in range(rounds):
            times[0].append(seconds_of(baseline.run) * self.rows / held)
            for i, ((_, pool, _), (program, _)) in enumerate(zip(runs, programs, strict=True)):
                times[i + 1].append(self._timed(program, pool, counts[i]))
        seconds, counts = [statistics.median(found) for found in times], counts / (rounds * len(self.copies))
        codes = [("scalar", 1, (0.0, 0.0))]
        codes += [(code, pool.threads, tuple(count)) for (code, pool, _), count in zip(runs, counts.tolist(), strict=True)]
        return [Comparison(self.format, self.columns, self.rows, tokens, used, code, taken,
                           2 * tokens * self.rows * self.columns / taken, seconds[0] / taken, *count)
                for (code, used, count), taken in zip(codes, seconds, strict=True)]

    def _timed(self, program: Program, pool: Pool, counts: np.ndarray) -> float:
        # Threads of a pool that had nothing to do while others ran are asleep.
        program.run()
        pool.reset()
        seconds = seconds_of(program.run) / len(self.copies)
        stats = pool.stats()
        counts += stats.tasks_created, stats.tasks_stolen
        return seconds

    def _check(self, expected: np.ndarray, others) -> None:
        for code, out in others:
            if not np.array_equal(expected.view(np.int32), out.view(np.int32)):
                raise BenchmarkError(f"{code}: the product with {self.format} weights {self.columns}x{self.rows} has other bits "
                                     "than the other ways to compute it")


def _first_rows(plain, count: int):
    """The first rows of an array or of packed weights."""
    if isinstance(plain, np.ndarray):
        return plain[:count]
    scales = None if plain.row_scales is None else plain.row_scales[:count]
    return replace(plain, n=count, codes=plain.codes[:count], scales=plain.scales[:count], row_scales=scales)
