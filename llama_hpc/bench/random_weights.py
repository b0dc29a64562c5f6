"""Random weights in the layouts of the CPU's kernels, made without quantising anything: bits from a bank, at the speed of memory.

Their size follows from the number of columns, so that a model of them stays within the range of exact sums.
"""

import itertools
from math import sqrt

import numpy as np

from llama_hpc.bench.random_rows import CODEBOOK, EIGHT_BITS, FACTOR_SIZE, PAIR_SIZE, RandomRows
from llama_hpc.kernels.cpu.simd_weights import KINDS
from llama_hpc.kernels.cpu.weights import Weights, allocate, allocate_pair, fill
from llama_hpc.kernels.formats import Blocks, Packed, table_format
from llama_hpc.model.attention import AttentionWeights
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import cache_format
from llama_hpc.model.layer import LayerWeights
from llama_hpc.model.linear import NO_BIAS, LinearWeights
from llama_hpc.model.mlp import MLPWeights
from llama_hpc.model.sizes import Projection, projections, whole
from llama_hpc.model.transformer import StageWeights


class RandomWeights(RandomRows):
    """The same as matrices that CPU kernels multiply."""

    def matrix(self, weights_format: str, rows: int, blocks: Blocks) -> Weights:
        """Kernel weights [rows, blocks.size]."""
        return self._drawn(weights_format, allocate(weights_format, rows, blocks, _codebook(weights_format)))

    def pair(self, weights_format: str, rows: int, blocks: Blocks) -> list[Weights]:
        """The same for gate and up."""
        both = allocate_pair(weights_format, rows, blocks, [_codebook(weights_format)] * 2)
        return [self._drawn(weights_format, each) for each in both]

    def _drawn(self, weights_format: str, weights: Weights) -> Weights:
        size = 1 / sqrt(max(1, weights.blocks.size))
        if not weights.quantized:
            _repeat(self._plain(weights_format, size), weights.data)
            return weights
        _repeat(self._bytes, weights.data.view(np.uint8))
        if KINDS[weights.layout].indexed:
            weights.row_scales[:] = size / (FACTOR_SIZE * (PAIR_SIZE if weights.layout == "codes" else EIGHT_BITS))
            return weights
        # A line of factors, then the codes of the pair of groups behind it.
        lines = weights.data.view(np.float16).reshape(len(weights.data), 2, -1, 1 + KINDS[weights.layout].vectors, 32)[..., 0, :]
        lines[:] = np.resize(self._factors(weights_format, size, lines.size // max(1, len(lines))), lines.shape[1:])
        weights.row_scales[:] = 1
        return weights


def _codebook(weights_format: str) -> np.ndarray | None:
    return CODEBOOK if weights_format == "q3_5" else None


def filled(weights_format: str, plain: Packed | np.ndarray, blocks: Blocks) -> Weights:
    """Kernel weights of rows as ``RandomWeights.rows`` gives them, or of a part of them."""
    rows = len(plain) if isinstance(plain, np.ndarray) else plain.n
    weights = allocate(weights_format, rows, blocks, _codebook(weights_format))
    fill(weights, 0, plain)
    return weights


def copied(weights: Weights, weights_format: str) -> Weights:
    """The same weights elsewhere in memory."""
    found = allocate(weights_format, weights.rows, weights.blocks, _codebook(weights_format))
    found.data[...], found.row_scales[...] = weights.data, weights.row_scales
    return found


def random_stage(config: ModelConfig, weights_format: str) -> StageWeights:
    """All weights of a model of this shape: random matrices, norms of ones, biases of zeros."""
    random, head_dim, hidden = RandomWeights(), config.head_dim, config.hidden_size
    found = iter(projections(config, *whole(config)))
    def matrix(shape: Projection) -> Weights:
        kind = table_format(weights_format, shape.table) if shape.table else weights_format
        return random.matrix(kind, shape.rows, Blocks(shape.columns, shape.block))
    def linear(weights: Weights, biased: bool) -> LinearWeights:
        return LinearWeights(weights, np.zeros(weights.rows, np.float32) if biased else NO_BIAS)
    layers = []
    for _ in range(config.num_layers):
        q, k, v, gate, _, o, down = itertools.islice(found, 7)
        norms = (np.ones(head_dim, np.float32), np.ones(head_dim, np.float32)) if config.qk_norm else ()
        attention = AttentionWeights(*(linear(matrix(shape), config.attention_bias) for shape in (q, k, v)),
                                     linear(matrix(o), config.output_bias), *norms)
        pair = random.pair(weights_format, gate.rows, Blocks(gate.columns, gate.block))
        mlp = MLPWeights(*(linear(weights, config.mlp_bias) for weights in (*pair, matrix(down))))
        layers.append(LayerWeights(np.ones(hidden, np.float32), attention, np.ones(hidden, np.float32), mlp))
    embedding = linear(matrix(next(found)), False)
    head = embedding if config.tie_embeddings else linear(matrix(next(found)), False)
    plain = weights_format in ("f16", "f32")
    kv_cache = cache_format("auto", weights_format)
    return StageWeights(not plain, kv_cache, layers, embedding, np.ones(hidden, np.float32), head)


def _repeat(bank: np.ndarray, target: np.ndarray) -> None:
    """Fills an array whose panels are contiguous with copies of parts of the bank."""
    size, first = target[:1].size, 0
    for panel in target:
        first = first if first + size <= bank.size else 0
        panel[...] = np.resize(bank[first : first + size], panel.shape)
        first += size
