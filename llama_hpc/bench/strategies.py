"""Three ways to share a product among ranks, each over several copies of the matrix, one after the other as layers are.

A rank has the float32 activations of the whole batch; quantising what it multiplies is part of the product.
"""

import time
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu import joining, products
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, add_quantize
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.random_weights import RandomWeights, copied, filled
from llama_hpc.kernels.cpu.weights import Weights
from llama_hpc.kernels.cpu.workers import ONE_TASK, PANEL, Pool
from llama_hpc.kernels.formats import Blocks, Packed
from llama_hpc.kernels.numerics import down_block
from llama_hpc.model.shares import part


class Matrix:
    """Weights [rows, columns] of a format, whole, of which ranks take shares: whole panels of rows or whole reduction blocks."""

    def __init__(self, weights_format: str, plain: Packed | np.ndarray, blocks: Blocks):
        self.format, self.plain, self.blocks = weights_format, plain, blocks
        self.rows = len(plain) if isinstance(plain, np.ndarray) else plain.n

    @classmethod
    def random(cls, weights_format: str, columns: int, rows: int) -> "Matrix":
        """Random weights, in reduction blocks as those of a layer that is cut along its columns."""
        blocks = Blocks(columns, down_block(columns))
        return cls(weights_format, RandomWeights().rows(weights_format, rows, blocks), blocks)

    def row_share(self, ranks: int, rank: int) -> range:
        """The rows of a rank."""
        return _units(self.rows, PANEL, ranks, rank)

    def column_share(self, ranks: int, rank: int) -> range:
        """The columns of a rank."""
        return _units(self.blocks.size, self.blocks.block, ranks, rank)

    def held(self, rows: range, columns: range, copies: int) -> list[Weights]:
        """The same share so many times in memory."""
        first = filled(self.format, self.part(rows, columns), Blocks(len(columns), self.blocks.block))
        return [first] + [copied(first, self.format) for _ in range(1, copies)]

    def part(self, rows: range, columns: range) -> Packed | np.ndarray:
        """A share as ``filled`` takes it."""
        height, blocks = slice(rows.start, rows.stop), Blocks(len(columns), self.blocks.block)
        if isinstance(self.plain, np.ndarray):
            return self.plain[height, columns.start : columns.stop]
        first = columns.start // blocks.block * blocks.groups_per_block
        width = slice(first, first + blocks.groups)
        scales = self.plain.row_scales
        return replace(self.plain, n=len(rows), blocks=blocks, codes=np.ascontiguousarray(self.plain.codes[height, width]),
                       scales=np.ascontiguousarray(self.plain.scales[height, width]),
                       row_scales=None if scales is None else scales[height])


def _units(total: int, unit: int, ranks: int, rank: int) -> range:
    share = part(-(-total // unit), ranks, rank)
    return range(min(share.start * unit, total), min(share.stop * unit, total))


class Share:
    """What a rank does of the products of ``x``, float32 [batch, columns]. Making one, and its methods, are collective.

    ``communication`` counts the seconds that exchanges took, those of waiting for other ranks included.
    """

    def __init__(self, comm: MPI.Comm, matrix: Matrix, weights: list[Weights], pool: Pool, x: np.ndarray):
        self.comm, self.matrix, self.weights, self.pool, self.batch = comm, matrix, weights, pool, len(x)
        self.communication = 0.0
        self.out = np.zeros((len(x), matrix.rows), np.float32)
        self.programs = self._prepare(x)

    def _programs(self, x: np.ndarray, out: np.ndarray, mode: int) -> list[Program]:
        """The product with each copy of the weights; empty programs where this rank has nothing to do."""
        first, tokens = self.weights[0], np.array([len(x)])
        activation = Activation(*x.shape, first.blocks.block, first.quantized)
        activation.values[:] = x
        found = [Program(self.pool) for _ in self.weights]
        for program, weights in zip(found, self.weights, strict=True):
            if len(x) and weights.rows:
                if weights.quantized:
                    add_quantize(program, "x", activation, tokens)
                add_product(program, "product", activation, [weights.part(out)], weights.layout, tokens, mode)
        return found

    def step(self, copy: int) -> None:
        """One product."""
        if self.programs[copy].names:
            self.programs[copy].run()
        self._join()

    def run(self, times: int) -> None:
        """The products with all copies, so many times."""
        for _ in range(times):
            for copy in range(len(self.weights)):
                self.step(copy)

    def is_right(self, expected: np.ndarray) -> bool:
        """Whether this rank has its part of the expected bits from every copy."""
        right = True
        for copy, program in enumerate(self.programs):
            self.out[:] = 0
            self.step(copy)
            right &= not program.status.any() and np.array_equal(self._own(self.out).view(np.int32),
                                                                 self._own(expected).view(np.int32))
        return right

    def _own(self, out: np.ndarray) -> np.ndarray:
        """Of the whole product, what this rank should have."""
        return out

    def _join(self) -> None:
        """Makes the whole product of what all ranks have computed, by ``_exchange``; nothing where it is not to be joined."""

    def _exchange(self, function, *arguments) -> None:
        start = time.perf_counter()
        function(*arguments)
        self.communication += time.perf_counter() - start


class DataParallel(Share):
    """Rows of the batch are dealt to the ranks, each of which has all weights."""

    @staticmethod
    def shares(matrix: Matrix, ranks: int, rank: int) -> tuple[range, range]:
        """Rows and columns of the weights."""
        return range(matrix.rows), range(matrix.blocks.size)

    def _prepare(self, x: np.ndarray) -> list[Program]:
        rows = part(self.batch, self.comm.size, self.comm.rank)
        self._rows = slice(rows.start, rows.stop)
        return self._programs(x[self._rows], self._own(self.out), products.FLOAT)

    def _own(self, out: np.ndarray) -> np.ndarray:
        return out[self._rows]


class ModelParallel(Share):
    """Each rank computes some of the outputs, which are gathered on all; putting them in their places counts as communication."""

    @staticmethod
    def shares(matrix: Matrix, ranks: int, rank: int) -> tuple[range, range]:
        """Rows and columns of the weights."""
        return matrix.row_share(ranks, rank), range(matrix.blocks.size)

    def _prepare(self, x: np.ndarray) -> list[Program]:
        ranks = self.comm.size
        shares = [self.matrix.row_share(ranks, rank) for rank in range(ranks)]
        counts = [self.batch * len(share) for share in shares]
        gathered = np.zeros(sum(counts), np.float32)
        pieces = np.split(gathered, np.cumsum(counts)[:-1])
        self._columns = [(slice(share.start, share.stop), piece.reshape(self.batch, len(share)))
                         for share, piece in zip(shares, pieces, strict=True)]
        self._sent = np.zeros((self.batch, len(shares[self.comm.rank])), np.float32)
        self._received = [gathered, counts]
        return self._programs(x, self._sent, products.FLOAT)

    def _join(self) -> None:
        self._exchange(self._gather)

    def _gather(self) -> None:
        self.comm.Allgatherv(self._sent, self._received)
        for columns, piece in self._columns:
            self.out[:, columns] = piece


class TensorParallel(Share):
    """Each rank has some of the inputs; the fixed-point sums of all are added exactly, as in row-parallel layers."""

    @staticmethod
    def shares(matrix: Matrix, ranks: int, rank: int) -> tuple[range, range]:
        """Rows and columns of the weights."""
        return range(matrix.rows), matrix.column_share(ranks, rank)

    def _prepare(self, x: np.ndarray) -> list[Program]:
        columns = self.matrix.column_share(self.comm.size, self.comm.rank)
        self._sums, self._reducer = np.zeros(self.out.shape, np.int64), TensorReducer(self.comm)
        self._last = Program(self.pool)
        self._last.add("product", joining.join_operation, joining.JOIN, ONE_TASK.record(self.pool.threads),
                       rows=np.array([self.batch]), columns=self.matrix.rows, parts=np.array([address(self._sums)]), ranks=1,
                       kind=joining.FINISH, target=self.out, bias=None, spent=self._reducer.nanoseconds)
        return self._programs(x[:, columns.start : columns.stop], self._sums, products.SUMS)

    def _join(self) -> None:
        self._exchange(self._reducer.sum_fixed, self._sums)
        # Adds to what is there, as to a model's residual.
        self._last.run()


STRATEGIES = {"data": DataParallel, "model": ModelParallel, "tensor": TensorParallel}
