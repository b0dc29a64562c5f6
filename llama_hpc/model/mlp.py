"""The feed-forward network of one layer (SwiGLU), parallel over blocks of intermediate channels."""

from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.model.linear import ColumnParallelLinear, LinearWeights, RowParallelLinear
from llama_hpc.model.steps import Steps


class MLPWeights:
    """This rank's share of gate, up and down."""

    def __init__(self, gate: LinearWeights, up: LinearWeights, down: LinearWeights):
        self.gate, self.up, self.down = gate, up, down


class ParallelMLP:
    """down(silu(gate(x)) * up(x)), from the normed input to the residual. Collective over the tensor group."""

    def __init__(self, layer: int, weights: MLPWeights, buffers):
        self.buffers = buffers
        self.gate_up = ColumnParallelLinear(layer, {"gate": weights.gate, "up": weights.up})
        self.down = RowParallelLinear("down", layer, weights.down)

    def add(self, steps: Steps, normed: Activation) -> None:
        """Reads ``normed``, adds to buffers.residual: gate, up and what follows are one product, down another."""
        b = self.buffers
        self.gate_up.add_gated(steps, normed, b.gated)
        self.down.add(steps, b.gated, b.residual, b.sums[1])
