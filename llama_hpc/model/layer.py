"""One transformer layer: attention and feed-forward network, each after its norm."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.model.attention import AttentionWeights, ParallelAttention
from llama_hpc.model.mlp import MLPWeights, ParallelMLP
from llama_hpc.model.steps import Steps


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

    def add(self, steps: Steps) -> None:
        """Appends the layer: eight operations on one tensor rank."""
        b = self.buffers
        self.attention.add(steps, b.add_layer_norm(steps, self.weights.attention_norm, "attention_norm", self.layer))
        self.mlp.add(steps, b.add_layer_norm(steps, self.weights.mlp_norm, "mlp_norm", self.layer))
