"""The feed-forward network of one layer (SwiGLU), parallel over blocks of intermediate channels."""

from llama_hpc.kernels.cpu import elementwise
from llama_hpc.model.linear import LinearWeights


class MLPWeights:
    """This rank's share of gate, up and down."""

    def __init__(self, gate: LinearWeights, up: LinearWeights, down: LinearWeights):
        self.gate, self.up, self.down = gate, up, down


class ParallelMLP:
    """down(silu(gate(x)) * up(x)), from the normed input to the residual. Collective over the tensor group."""

    def __init__(self, layer: int, weights: MLPWeights, buffers):
        self.layer, self.buffers = layer, buffers
        self.gate = buffers.column_parallel("gate", layer, weights.gate)
        self.up = buffers.column_parallel("up", layer, weights.up)
        self.down = buffers.row_parallel("down", layer, weights.down)

    def forward(self, batch) -> None:
        """batch: the step's ``Batch``; reads buffers.normed, adds to buffers.residual."""
        b, rows = self.buffers, batch.rows
        self.gate.forward(b.normed, b.gated.values, rows)
        self.up.forward(b.normed, b.up, rows)
        elementwise.silu_multiply(b.gated.values, b.up, b.gated.values, rows)
        b.faults.note(b.gated.prepare(rows), "down", self.layer)
        self.down.forward(b.gated, b.residual, rows)
