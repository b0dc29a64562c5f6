"""Linear layers over a tensor group: column parallel (outputs cut) and row parallel (inputs cut, one exact sum)."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu import elementwise, matmul
from llama_hpc.kernels.cpu.int8_weights import ByteWeights, PairWeights
from llama_hpc.kernels.cpu.matmul import FloatWeights, IntegerWeights
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import GROUP
from llama_hpc.model.faults import Faults

NO_BIAS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class LinearWeights:
    """One rank's share of a projection: kernel weights, and the bias of its outputs (empty without one)."""

    weights: FloatWeights | IntegerWeights | ByteWeights | PairWeights
    bias: np.ndarray


class Activation:
    """Input of products: float32 ``values`` [rows, K], quantised once for all the layers that read them.

    ``quantized``: whether the weights are integers; ``block``: k per reduction block.
    """

    def __init__(self, values: np.ndarray, block: int, quantized: bool):
        rows, columns = values.shape
        self.values, self.block, self.quantized = values, block, quantized
        self.operand, self.scales, self.corrections = values, np.zeros((1, 1), np.float32), None
        if quantized:
            blocks, int8 = Blocks(columns, block), kernels() != "float"
            if int8:
                shape = blocks.n_blocks, rows, blocks.groups_per_block
                self.operand = np.zeros((*shape[:2], shape[2] * GROUP), np.int8)
                self.scales, self.corrections = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
            else:
                self.operand = np.zeros((rows, blocks.padded), np.float32)
                self.scales = np.zeros((rows, blocks.groups), np.float32)

    def prepare(self, rows: int) -> int:
        """Quantises the first rows; returns a kernel status."""
        if not self.quantized:
            return 0
        if self.corrections is None:
            return elementwise.quantize_rows(self.values, self.block, self.operand, self.scales, rows)
        return elementwise.quantize_rows_int8(self.values, self.block, self.operand, self.scales, self.corrections, rows)


class _Linear:
    def __init__(self, name: str, layer: int, linear: LinearWeights, rows: int, threads: int, faults: Faults, sums: np.ndarray):
        self.name, self.layer, self.threads, self.faults = name, layer, threads, faults
        self.weights, self.bias = linear.weights, linear.bias
        width = matmul.tiles(linear.weights.rows) * matmul.LANES
        self.sums = sums[: rows * width].reshape(rows, width)

    def _multiply(self, x: Activation, rows: int) -> None:
        status = matmul.matmul(x.operand, x.scales, self.weights, self.sums, rows, self.threads, x.corrections)
        self.faults.note(status, self.name, self.layer)


class ColumnParallelLinear(_Linear):
    """y = x Wᵀ + b for this rank's outputs; no communication."""

    def forward(self, x: Activation, out: np.ndarray, rows: int) -> None:
        """out float32 [rows, outputs of this rank]."""
        self._multiply(x, rows)
        self.faults.note(elementwise.finish(self.sums, self.bias, out, rows), self.name, self.layer)


class RowParallelLinear(_Linear):
    """residual += x Wᵀ + b, where each rank holds some of the inputs. Collective over the tensor group."""

    def __init__(self, *args, reducer: TensorReducer):
        super().__init__(*args)
        self.reducer = reducer

    def forward(self, x: Activation, residual: np.ndarray, rows: int) -> None:
        """residual float32 [rows, hidden_size], the same on every rank before and after."""
        self._multiply(x, rows)
        self.reducer.sum_fixed(self.sums[:rows])
        self.faults.note(elementwise.finish_add(self.sums, self.bias, residual, rows), self.name, self.layer)
