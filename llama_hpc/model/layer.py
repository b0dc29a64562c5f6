"""One transformer layer: attention and feed-forward network, each after its norm."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.model.attention import AttentionWeights, ParallelAttention
from llama_hpc.model.mlp import MLPWeights, ParallelMLP


@dataclass(frozen=True)
class LayerWeights:
    """One rank's share of a layer; norms are float32 [hidden_size] and held whole."""

    attention_norm: np.ndarray
    attention: AttentionWeights
    mlp_norm: np.ndarray
    mlp: MLPWeights


class ParallelLayer:
    """Adds one layer to buffers.residual. Collective over the tensor group."""

    def __init__(self, layer: int, weights: LayerWeights, buffers):
        self.layer, self.weights, self.buffers = layer, weights, buffers
        self.attention = ParallelAttention(layer, weights.attention, buffers)
        self.mlp = ParallelMLP(layer, weights.mlp, buffers)

    def forward(self, batch) -> None:
        self.buffers.norm(self.weights.attention_norm, batch.rows, "attention_norm", self.layer)
        self.attention.forward(batch)
        self.buffers.norm(self.weights.mlp_norm, batch.rows, "mlp_norm", self.layer)
        self.mlp.forward(batch)
