"""Models of random weights, of any shape: to time what has no checkpoint, or before one is read."""

import itertools

import numpy as np

from llama_hpc.kernels.formats import PLAIN_BYTES, Blocks, table_format
from llama_hpc.model.attention import AttentionWeights
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import cache_format
from llama_hpc.model.layer import LayerWeights
from llama_hpc.model.linear import NO_BIAS, LinearWeights
from llama_hpc.model.mlp import MLPWeights
from llama_hpc.model.shares import StageShare, TensorShare
from llama_hpc.model.sizes import Projection, projections
from llama_hpc.model.transformer import StageWeights


def random_stage(config: ModelConfig, weights_format: str, stage: StageShare, share: TensorShare, random) -> StageWeights:
    """What one rank holds in a model of this shape: random matrices, norms of ones, biases of zeros.

    ``random`` makes the matrices where they are multiplied: ``RandomWeights`` of kernels.cpu, or ``RandomDeviceWeights`` of
    kernels.cuda.
    """
    head_dim, hidden = config.head_dim, config.hidden_size
    found = iter(projections(config, stage, share))
    def matrix(shape: Projection):
        kind = table_format(weights_format, shape.table) if shape.table else weights_format
        return random.matrix(kind, shape.rows, Blocks(shape.columns, shape.block))
    def linear(weights, biased: bool) -> LinearWeights:
        return LinearWeights(weights, np.zeros(weights.rows, np.float32) if biased else NO_BIAS)
    layers = []
    for _ in stage.layers:
        q, k, v, gate, _, o, down = itertools.islice(found, 7)
        norms = (np.ones(head_dim, np.float32), np.ones(head_dim, np.float32)) if config.qk_norm else ()
        attention = AttentionWeights(*(linear(matrix(shape), config.attention_bias) for shape in (q, k, v)),
                                     linear(matrix(o), config.output_bias), *norms)
        pair = random.pair(weights_format, gate.rows, Blocks(gate.columns, gate.block))
        mlp = MLPWeights(*(linear(weights, config.mlp_bias) for weights in (*pair, matrix(down))))
        layers.append(LayerWeights(np.ones(hidden, np.float32), attention, np.ones(hidden, np.float32), mlp))
    # Tied, one table serves both ends of a model.
    tables = [linear(matrix(shape), False) for shape in found]
    return StageWeights(weights_format not in PLAIN_BYTES, cache_format("auto", weights_format), layers,
                        tables[0] if stage.first else None, np.ones(hidden, np.float32) if stage.last else None,
                        tables[-1] if stage.last else None)
