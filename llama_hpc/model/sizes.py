"""How many weights, and how many bytes in memory and packed, a model or a share of it takes. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

from llama_hpc.kernels.cpu.attention import scratch_bytes
from llama_hpc.kernels.cpu.panels import UNIT
from llama_hpc.kernels.cpu.weights import allocated_bytes
from llama_hpc.kernels.formats import PLAIN_BYTES, Blocks, packed_bytes, table_format
from llama_hpc.kernels.numerics import BLOCK, GROUP, down_block
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import DTYPES, bytes_per_position, cache_format
from llama_hpc.model.shares import StageShare, TensorShare


@dataclass(frozen=True)
class Projection:
    """A matrix of ``rows`` x ``columns``, reduction block ``block``; ``table``: ``embedding`` or ``head``, or nothing."""

    rows: int
    columns: int
    block: int
    table: str = ""


def projections(config: ModelConfig, stage: StageShare, share: TensorShare) -> Iterator[Projection]:
    """All matrices that one rank holds."""
    hidden, head_dim, ffn = config.hidden_size, config.head_dim, len(share.ffn)
    q, kv = len(share.query_heads) * head_dim, len(share.kv_heads) * head_dim
    for _ in stage.layers:
        yield from (Projection(rows, hidden, BLOCK) for rows in (q, kv, kv, ffn, ffn))
        yield Projection(hidden, q, min(head_dim, BLOCK))
        yield Projection(hidden, ffn, down_block(config.intermediate_size))
    tied = config.tie_embeddings
    if stage.first or (stage.last and tied):
        yield Projection(len(share.vocabulary), hidden, BLOCK, "embedding")
    if stage.last and not tied:
        yield Projection(len(share.vocabulary), hidden, BLOCK, "head")


def whole(config: ModelConfig) -> tuple[StageShare, TensorShare]:
    """The share of a rank that holds everything."""
    return StageShare(range(config.num_layers), True, True), TensorShare.of(config, 1, 0)


def parameters(config: ModelConfig) -> int:
    """Weights of the model: matrices, norms and biases."""
    per_layer = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    per_layer += (config.q_size + 2 * config.kv_size) * config.attention_bias + config.hidden_size * config.output_bias
    per_layer += (2 * config.intermediate_size + config.hidden_size) * config.mlp_bias
    matrices = sum(p.rows * p.columns for p in projections(config, *whole(config)))
    return matrices + per_layer * config.num_layers + config.hidden_size


def packed_bits(config: ModelConfig, weights_format: str) -> tuple[float, float]:
    """Bits per weight all in (codes, scales, codebooks, padding): of the layers' projections, and of all matrices."""
    def bits(matrices: list[Projection]) -> float:
        total = sum(_packed(p, weights_format) for p in matrices)
        return 8 * total / sum(p.rows * p.columns for p in matrices)
    matrices = list(projections(config, *whole(config)))
    return bits([p for p in matrices if not p.table]), bits(matrices)


def _packed(p: Projection, weights_format: str) -> int:
    return packed_bytes(_format(p, weights_format), p.rows, Blocks(p.columns, p.block))


def _format(p: Projection, weights_format: str) -> str:
    return table_format(weights_format, p.table) if p.table else weights_format


def weight_bytes(config: ModelConfig, weights_format: str, stage: StageShare, share: TensorShare) -> int:
    """Bytes of one rank's matrices in memory, as the CPU kernels hold them."""
    total = 0
    for p in projections(config, stage, share):
        total += allocated_bytes(_format(p, weights_format), p.rows, Blocks(p.columns, p.block))
    return total


def cache_bytes(config: ModelConfig, weights_format: str, stage: StageShare, share: TensorShare, kv_cache: str = "auto") -> int:
    """Bytes of one rank's KV cache for each position of a sequence; ``kv_cache`` as in ``kv_cache.cache_format``."""
    dtype = DTYPES[cache_format(kv_cache, weights_format)]
    return bytes_per_position(config.head_dim, len(share.kv_heads), len(stage.layers), dtype)


def buffer_bytes(config: ModelConfig, weights_format: str, stage: StageShare, share: TensorShare, *, rows: int, outputs: int,
                 max_seq_len: int, threads: int, joined: bool) -> int:
    """Bytes of the buffers of one rank once steps of ``rows`` rows and ``outputs`` logits have run; ``joined``: with other tensor
    ranks, through memory that they share. Those of pipelines and of context parallelism are not counted."""
    hidden, head_dim, heads = config.hidden_size, config.head_dim, len(share.query_heads)
    quantized = weights_format not in PLAIN_BYTES
    def activation(count: int, columns: int, block: int) -> int:
        blocks = Blocks(columns, block)
        units = -(-blocks.groups // (UNIT // blocks.groups_per_block * blocks.groups_per_block))
        return count * (4 * columns + quantized * units * UNIT * (GROUP + 8))
    # Two regions of sums, and one of rows of the embedding.
    residuals = rows * hidden * (4 + (2 * 8 + 4 * stage.first if joined else 8))
    projections = 4 * rows * head_dim * (heads + 2 * len(share.kv_heads))
    activations = activation(rows, hidden, BLOCK) + activation(rows, heads * head_dim, min(head_dim, BLOCK))
    activations += activation(rows, len(share.ffn), down_block(config.intermediate_size))
    logits = outputs * 4 * len(share.vocabulary) + activation(outputs, hidden, BLOCK) if stage.last else 0
    tables = 4 * max_seq_len * head_dim
    scratch = threads * scratch_bytes(max_seq_len, head_dim, config.num_heads // config.kv_heads)
    return residuals + projections + activations + logits + tables + scratch
