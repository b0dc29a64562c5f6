"""Who holds what: the share of a model that belongs to one stage and one tensor rank. Pure arithmetic, no communication.

Shares need not be equal. Query heads, FFN blocks and vocabulary tiles are dealt out in contiguous runs whose sizes
differ by at most one; each rank holds the KV heads that its query heads use, so a KV head may be held twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.kernels.numerics import down_block
from llama_hpc.model.config import ModelConfig

VOCABULARY_TILE = 16


def part(total: int, parts: int, index: int) -> range:
    """The index-th of ``parts`` contiguous runs of ``total`` things; sizes differ by at most one."""
    return range(total * index // parts, total * (index + 1) // parts)


@dataclass(frozen=True)
class TensorShare:
    """What one tensor rank holds of every layer, as ranges of the whole model's indices.

    ``ffn`` counts intermediate channels (whole reduction blocks of the down projection) and may be empty; ``vocabulary``
    counts rows of the embedding and the output head.

    With context parallelism, ``context`` consecutive ranks form a group that deals out attention blocks: all of them hold the KV
    heads that ``group_heads``, the query heads of the group, use; the rank is number ``context_index`` of them.
    """

    query_heads: range
    kv_heads: range
    ffn: range
    vocabulary: range
    group_heads: range
    context: int = 1
    context_index: int = 0

    @classmethod
    def of(cls, config: ModelConfig, size: int, index: int, context: int = 1) -> "TensorShare":
        """That of one of ``size`` ranks, in groups of ``context`` (which divides size)."""
        heads = part(config.num_heads, size, index)
        first = index // context * context
        group = range(part(config.num_heads, size, first).start, part(config.num_heads, size, first + context - 1).stop)
        per_kv = config.num_heads // config.kv_heads
        block = down_block(config.intermediate_size)
        blocks = part(-(-config.intermediate_size // block), size, index)
        tiles = part(-(-config.vocab_size // VOCABULARY_TILE), size, index)
        return cls(
            query_heads=heads,
            kv_heads=range(group.start // per_kv, (group.stop - 1) // per_kv + 1),
            ffn=range(blocks.start * block, min(blocks.stop * block, config.intermediate_size)),
            vocabulary=range(tiles.start * VOCABULARY_TILE, min(tiles.stop * VOCABULARY_TILE, config.vocab_size)),
            group_heads=group, context=context, context_index=index - first,
        )


@dataclass(frozen=True)
class StageShare:
    """The layers of one pipeline stage; the first holds the embedding, the last the final norm and the output head."""

    layers: range
    first: bool
    last: bool


def layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer's projections."""
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    return attention + 3 * config.hidden_size * config.intermediate_size


def stage_shares(config: ModelConfig, stages: int, seconds: Sequence[float] | None = None,
                 most: Sequence[int] | None = None, outputs: float = 0.5) -> list[StageShare]:
    """Contiguous layers for every stage, at least one each, so that the costliest stage is as cheap as it can be.

    ``seconds``: what one layer takes on each stage (None: the same everywhere). The last stage has the output head besides, which
    counts by its weights times ``outputs``, the share of tokens whose logits are needed: those of prompts are not. ``most``:
    layers that each stage has at most, together no fewer than there are.
    """
    speeds, rooms = seconds or [1.0] * stages, most or [config.num_layers] * stages
    head = outputs * config.vocab_size * config.hidden_size / layer_parameters(config)
    def cost(stage: int, count: int) -> float:
        return speeds[stage] * (count + head * (stage == stages - 1))
    # Each layer goes where it ends first, of such stages to the last: nothing is gained by moving one afterwards.
    counts = [1] * stages
    for _ in range(config.num_layers - stages):
        takers = (s for s in range(stages) if counts[s] < rooms[s])
        counts[min(takers, key=lambda s: (cost(s, counts[s] + 1), -s))] += 1
    # Of stages that are alike, those with a layer more do not follow one another.
    if seconds is None and most is None and stages > 1:
        rest = config.num_layers - counts[-1]
        counts[:-1] = [len(part(rest, stages - 1, s)) for s in range(stages - 1)]
    starts = [sum(counts[:s]) for s in range(stages + 1)]
    return [StageShare(range(starts[s], starts[s + 1]), s == 0, s == stages - 1) for s in range(stages)]


def check_grid(config: ModelConfig, shape: GridShape, context: int = 1) -> None:
    """Raises UsageError when the model cannot be cut this way, naming the dimension and what would fit."""
    if shape.tensor % context:
        raise UsageError(f"grid {shape}: --context-parallel is {context}, which does not divide {shape.tensor} tensor ranks; use "
                         f"--context-parallel {gcd(context, shape.tensor)}, or a multiple of {context} tensor ranks")
    if shape.tensor > config.num_heads:
        raise UsageError(f"grid {shape}: the tensor dimension is {shape.tensor}, but this model has {config.num_heads} query "
                         f"heads; use at most {config.num_heads} tensor ranks")
    if shape.pipeline > config.num_layers:
        raise UsageError(f"grid {shape}: the pipeline dimension is {shape.pipeline}, but this model has {config.num_layers} "
                         f"layers; use at most {config.num_layers} stages")
