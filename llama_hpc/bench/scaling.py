"""``bench scaling``: one product on 1, 2, 4, … ranks, shared in three ways, by batch."""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.bench.products import activations, copies_of
from llama_hpc.bench.ranks import count_nodes, repetitions, sleep_until_all, slowest_seconds
from llama_hpc.bench.report import Report
from llama_hpc.bench.strategies import STRATEGIES, Matrix, Share
from llama_hpc.bench.table import print_row
from llama_hpc.kernels.cpu.calls import matmul
from llama_hpc.kernels.cpu.random_weights import filled
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.runtime.abort import agreed

MOST_COPIES = 32                # of the matrix: about the layers of a model
TITLES = ("strategy", "ranks", "nodes", "batch", "us", "rows/s", "speed-up", "efficiency", "communication")


@dataclass(frozen=True)
class Scaling:
    """One product: median seconds on the slowest rank, rows of the batch a second, and this against one rank.

    ``scaling``: ``strong``, of the same batch, or ``weak``, of the same batch for each rank (``batch`` is that of all ranks);
    ``efficiency`` is the speed-up by ranks, ``communication_share`` the share of the time in exchanges, a mean over ranks.
    """

    strategy: str
    scaling: str
    weights: str
    columns: int
    rows: int
    copies: int
    threads: int
    ranks: int
    nodes: int
    batch: int
    seconds: float
    rows_per_second: float
    speed_up: float
    efficiency: float
    communication_share: float

    def as_row(self) -> tuple[str, ...]:
        return (self.strategy, str(self.ranks), str(self.nodes), str(self.batch), f"{self.seconds * 1e6:.0f}",
                f"{self.rows_per_second:.0f}", f"{self.speed_up:.2f}", f"{self.efficiency:.2f}",
                f"{self.communication_share:.3f}")


def measure_scaling(args: argparse.Namespace, report: Report | None, world: MPI.Comm, pool: Pool) -> None:
    """Every number of ranks, strategy and batch. Collective over ``world``, whose first rank has the report and prints.

    Raises BenchmarkError where a strategy gives other bits than the product on one rank.
    """
    bench = _Bench(args, world, pool)
    if report:
        columns, rows = args.shape
        print(f"{columns}x{rows} {args.weights}, {bench.copies} copies; threads of a rank: {pool.threads}; batch of "
              f"{'each rank' if args.weak else 'all ranks'}")
        print_row(TITLES)
    for ranks in rank_counts(world.size):
        comm = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
        if comm != MPI.COMM_NULL:
            for found in bench.measure(comm):
                if report:
                    report.add("scaling", found)
                    print_row(found.as_row())
            comm.Free()
        sleep_until_all(world)
        bench.alone = world.bcast(bench.alone)
    if report:
        print("all strategies gave the bits of the product on one rank")


def rank_counts(ranks: int) -> list[int]:
    """1, 2, 4, … and all ranks."""
    return [1 << n for n in range(ranks.bit_length()) if 1 << n < ranks] + [ranks]


def warm_up(weights_format: str, pool: Pool) -> None:
    """Compiles, or loads from the disk cache, what all strategies need."""
    matrix, x = Matrix.random(weights_format, 32, 32), activations(1, 32)
    for strategy in STRATEGIES.values():
        strategy(MPI.COMM_SELF, matrix, matrix.held(*strategy.shares(matrix, 1, 0), 1), pool, x).run(1)


class _Bench:
    def __init__(self, args: argparse.Namespace, world: MPI.Comm, pool: Pool):
        """Collective over ``world``."""
        self.args, self.pool = args, pool
        with agreed(world, "making the weights"):
            self.matrix = Matrix.random(args.weights, *args.shape)
            self.whole = filled(args.weights, self.matrix.plain, self.matrix.blocks)
        # The caches of another node may be larger.
        self.copies = world.bcast(args.copies or min(MOST_COPIES, copies_of(self.whole)))
        # On one rank, where all strategies are the same: by batch, seconds of a product and share of exchanges.
        self.alone: dict[int, tuple[float, float]] = {}

    def measure(self, comm: MPI.Comm) -> Iterator[Scaling]:
        """What all ranks of ``comm`` reach. Collective over it; the first call is for one rank alone."""
        nodes, ranks, args = count_nodes(comm), comm.size, self.args
        if ranks == 1:
            self.alone = dict(self._timed(comm, "data"))
        for name in args.strategies:
            for batch, (seconds, communication) in self._timed(comm, name) if ranks > 1 else self.alone.items():
                total = batch * ranks if args.weak else batch
                speed, alone = total / seconds, batch / self.alone[batch][0]
                yield Scaling(name, "weak" if args.weak else "strong", args.weights, *args.shape, self.copies, self.pool.threads,
                              ranks, nodes, total, seconds, speed, speed / alone, speed / alone / ranks, communication)

    def _timed(self, comm: MPI.Comm, name: str) -> Iterator[tuple[int, tuple[float, float]]]:
        """Each batch of the options, seconds of a product, and the share of exchanges. Collective."""
        strategy = STRATEGIES[name]
        with agreed(comm, "making the weights"):
            weights = self.matrix.held(*strategy.shares(self.matrix, comm.size, comm.rank), self.copies)
        for batch in dict.fromkeys(self.args.batches):
            x = activations(batch * comm.size if self.args.weak else batch, self.matrix.blocks.size)
            share = strategy(comm, self.matrix, weights, self.pool, x)
            self._check(comm, name, share, x)
            yield batch, self._time(comm, share)

    def _check(self, comm: MPI.Comm, name: str, share: Share, x: np.ndarray) -> None:
        expected = np.empty((len(x), self.matrix.rows), np.float32)
        if comm.rank == 0:
            expected = matmul(x, self.whole, pool=self.pool)
        comm.Bcast(expected)
        right = share.is_right(expected)
        with agreed(comm, "checking the products"):
            if not right:
                raise BenchmarkError(f"{name} on {comm.size} ranks, batch {len(x)}: the product with {self.args.weights} weights "
                                     "has other bits than on one rank")

    def _time(self, comm: MPI.Comm, share: Share) -> tuple[float, float]:
        """Seconds of a product on the slowest rank, median over rounds; share of the time in exchanges, mean over ranks."""
        times = repetitions(comm, share.run)
        share.communication = 0.0
        found = [slowest_seconds(comm, share.run, times) for _ in range(self.args.rounds)]
        spent = comm.allreduce(share.communication, MPI.SUM) / comm.size
        return statistics.median(found) / self.copies, min(1.0, spent / (sum(found) * times))
