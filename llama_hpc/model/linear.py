"""Linear layers over a tensor group: column parallel (outputs cut) and row parallel (inputs cut, one exact sum)."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.reduce import Region
from llama_hpc.kernels.cpu import products
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product
from llama_hpc.kernels.cpu.weights import Weights
from llama_hpc.kernels.cpu.workers import WorkDistribution
from llama_hpc.model.steps import Steps

NO_BIAS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class LinearWeights:
    """One rank's share of a projection: kernel weights, and the bias of its outputs (empty without one)."""

    weights: Weights
    bias: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.bias.nbytes


class ColumnParallelLinear:
    """y = x Wᵀ + b for this rank's outputs; no communication. Matrices that read the same x are one product."""

    def __init__(self, layer: int, linears: dict[str, LinearWeights]):
        self.layer, self.linears = layer, {name: linear for name, linear in linears.items() if linear.weights.rows}

    def add(self, steps: Steps, x: Activation, outs: dict[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        """Appends the product; outs: float32 [rows, outputs of this rank] by name."""
        self._add(steps, x, {name: outs[name] for name in self.linears}, products.FLOAT, rows)

    def add_gated(self, steps: Steps, x: Activation, gated: Activation) -> None:
        """Appends silu(gate) * up, the two matrices in this order, into ``gated``, quantised if its reader wants that."""
        self._add(steps, x, dict.fromkeys(self.linears), products.GATED, None, gated)

    def _add(self, steps, x, outs, mode, rows, gated=None) -> None:
        if not self.linears:
            return
        parts = [linear.weights.part(outs[name], linear.bias) for name, linear in self.linears.items()]
        first = next(iter(self.linears.values())).weights
        work = WorkDistribution.for_matmul(sum(linear.weights.rows for linear in self.linears.values()), first.blocks.size,
                                           steps.schedule)
        names = (*self.linears, "down") if gated else tuple(self.linears)
        add_product(steps.program, (self.layer, names), x, parts, first.layout, steps.rows if rows is None else rows, mode, work,
                    gated)


class RowParallelLinear:
    """residual += x Wᵀ + b, where each rank holds some of the inputs. Collective over the tensor group."""

    def __init__(self, name: str, layer: int, linear: LinearWeights):
        self.name, self.layer, self.linear = name, layer, linear

    def add(self, steps: Steps, x: Activation, residual: np.ndarray, sums: Region) -> None:
        """Appends the product, with several ranks also the sum. residual float32 [rows, hidden_size], the same on every rank;
        sums int64 [rows, hidden_size] is scratch, and another one than that of the sum before."""
        weights, bias = self.linear.weights, self.linear.bias
        work = WorkDistribution.for_matmul(weights.rows, weights.blocks.size, steps.schedule)
        alone, name = steps.reducer.size == 1, (self.layer, (self.name,))
        out, mode = (residual, products.ADD) if alone else (sums.own, products.SUMS)
        part = weights.part(out, bias if alone else None)
        add_product(steps.program, name, x, [part], weights.layout, steps.rows, mode, work)
        if not alone:
            steps.add_sums(sums, residual, bias if bias.size else None, name)
