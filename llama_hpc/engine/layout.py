"""Choosing a grid, and what each of its ranks would hold."""

from dataclasses import dataclass, replace

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.sampling_params import shown
from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import longest_text, pages_in_a_part
from llama_hpc.model.shares import StageShare, TensorShare, stage_shares
from llama_hpc.model.sizes import cache_bytes, weight_bytes

USABLE = 0.85                   # share of a rank's memory that weights and cache may take
OVERHEAD = 300 << 20            # interpreter, libraries, compiled code and buffers of a rank


@dataclass(frozen=True)
class RankShare:
    """Place and share of one rank of a grid; ``weights`` and ``cache`` in bytes."""

    data: int
    stage: StageShare
    stage_index: int
    tensor_index: int
    share: TensorShare
    weights: int
    cache: int


@dataclass(frozen=True)
class Cut:
    """What each stage of a grid holds, and bytes that each of its ranks may use at least."""

    stages: list[StageShare]
    memory: list[int]

    @classmethod
    def even(cls, config: ModelConfig, stages: int, memory: int, outputs: float = 0.5) -> "Cut":
        """Of stages that are all as fast; ``outputs`` as for ``stage_shares``."""
        return cls(stage_shares(config, stages, outputs=outputs), [memory] * stages)


def rank_shares(config: ModelConfig, weights_format: str, shape: GridShape, cache_positions: int, kv_cache: str = "auto",
                context: int = 1, stages: list[StageShare] | None = None) -> list[RankShare]:
    """Every rank of the grid, in rank order; ``cache_positions``: positions of all sequences of a replica together.

    Here and below ``kv_cache`` is the cache's format, as in ``sizes.cache_bytes``, and ``context`` how many tensor ranks deal out
    its positions; ``stages``: what each holds (None: stages are all as fast).
    """
    stages = stages or stage_shares(config, shape.pipeline)
    if context > 1:
        cache_positions = pages_in_a_part(cache_positions, context) * PAGE
    replica = []
    for index, stage in enumerate(stages):
        for tensor in range(shape.tensor):
            share = TensorShare.of(config, shape.tensor, tensor, context)
            replica.append((stage, index, tensor, share, weight_bytes(config, weights_format, stage, share),
                            cache_positions * cache_bytes(config, weights_format, stage, share, kv_cache)))
    return [RankShare(data, *rank) for data in range(shape.data) for rank in replica]


def auto_grid(config: ModelConfig, weights_format: str, ranks: int, ranks_per_node: int, memory_per_rank: int, requests: int,
              max_seqs: int, max_seq_len: int, usual_len: int | None = None, kv_cache: str = "auto",
              context: int = 1, whose: str = "") -> GridShape:
    """As many replicas as memory allows, each of the fewest ranks that hold the model and its cache.

    The cache is to hold a sequence of ``max_seq_len`` positions, and all that run at a time if they take ``usual_len`` each.

    Tensor ranks are preferred to stages, and do not span nodes of ``ranks_per_node`` ranks each. ``memory_per_rank`` is in
    bytes, of what errors call ``whose``. Raises UsageError when no grid of this many ranks holds the model.
    """
    budget = int(memory_per_rank * USABLE) - OVERHEAD
    def need(shape: GridShape) -> int:
        sequences = min(max_seqs, -(-requests // shape.data))
        positions = max(max_seq_len, sequences * (usual_len or max_seq_len))
        return _need(config, weights_format, shape, positions, kv_cache, context)
    needs = []
    for size in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for shape in _shapes(config, ranks, size, ranks_per_node, context):
            needs.append((need(shape), shape))
            if needs[-1][0] <= budget:
                return shape
    if not needs:
        raise UsageError(f"no grid of {ranks} ranks has tensor ranks in groups of --context-parallel {context}: use a number "
                         f"that divides the ranks, {config.num_heads} at most, or another number of ranks")
    least, shape = min(needs, key=lambda tried: tried[0])
    cache = "" if kv_cache == "q8" else "--kv-cache q8, "
    raise UsageError(
        f"the model and its cache need {least / 2**30:.1f} GiB on a rank even on grid {shape}, but a rank may use "
        f"{_may_use(budget, whose)}; {_more_ranks(config, ranks, ranks_per_node, context, budget, need)}, {cache}or a smaller "
        "--weights format, --max-seqs or --max-seq-len (score: --token-budget or --window)")


def check_room(config: ModelConfig, weights_format: str, shape: GridShape, ranks_per_node: int, memory_per_rank: int,
               max_seq_len: int, whose: str, kv_cache: str = "auto", context: int = 1) -> None:
    """Raises UsageError where a rank of ``shape`` has no room for its weights and for a sequence of ``max_seq_len`` positions."""
    budget = int(memory_per_rank * USABLE) - OVERHEAD
    def need(shape: GridShape) -> int:
        return _need(config, weights_format, shape, max_seq_len, kv_cache, context)
    if need(shape) > budget:
        more = _more_ranks(config, shape.size // shape.data, ranks_per_node, context, budget, need)
        raise UsageError(f"on grid {shape} the model and a cache for one sequence need {need(shape) / 2**30:.1f} GiB on a rank, "
                         f"but a rank may use {_may_use(budget, whose)}; {more} in a replica, or a smaller --weights format")


def _may_use(budget: int, whose: str) -> str:
    return f"{max(budget, 0) / 2**30:.1f} GiB{whose and f' of {whose}'}"


def _shapes(config: ModelConfig, ranks: int, size: int, ranks_per_node: int, context: int) -> list[GridShape]:
    """Grids of so many ranks, replicas of ``size`` ranks each, those of most tensor ranks first."""
    return [GridShape(ranks // size, size // t, t) for t in range(size, 0, -1)
            if size % t == 0 and t % context == 0 and t <= config.num_heads and size // t <= config.num_layers
            and (ranks_per_node % t == 0 or ranks <= ranks_per_node)]


def _need(config: ModelConfig, weights_format: str, shape: GridShape, positions: int, kv_cache: str, context: int) -> int:
    """The most bytes that a rank holds of weights and of a cache for so many positions."""
    return max(r.weights + r.cache
               for r in rank_shares(config, weights_format, replace(shape, data=1), positions, kv_cache, context))


def _more_ranks(config: ModelConfig, ranks: int, ranks_per_node: int, context: int, budget: int, need) -> str:
    """What to do where ``ranks`` are too few: how many of the same kind would do, on which grid."""
    for more in (ranks << doubled for doubled in range(1, 8)) if budget > 0 else ():
        for shape in _shapes(config, more, more, ranks_per_node, context):
            if need(shape) <= budget:
                return f"use {more} such ranks (grid {shape} would fit)"
    return "use more nodes"


def layers_that_fit(config: ModelConfig, weights_format: str, shape: GridShape, memory: list[int], positions: int,
                    kv_cache: str = "auto", context: int = 1) -> list[int]:
    """How many layers each stage can hold, with a cache for so many positions, where its ranks may use ``memory`` bytes each."""
    shape, positions = replace(shape, data=1), -(-positions // PAGE) * PAGE
    def ranks(layers: int) -> list[RankShare]:
        stages = [StageShare(range(layers), s == 0, s == shape.pipeline - 1) for s in range(shape.pipeline)]
        return rank_shares(config, weights_format, shape, positions, kv_cache, context, stages)
    found = [config.num_layers] * shape.pipeline
    # The stages' embedding and output head, and these with a layer.
    for empty, one in zip(ranks(0), ranks(1), strict=True):
        room = int(memory[one.stage_index] * USABLE) - OVERHEAD - empty.weights
        found[one.stage_index] = min(found[one.stage_index], max(0, room) // (one.weights - empty.weights + one.cache))
    return found


def replica_pages(config: ModelConfig, weights_format: str, shape: GridShape, cut: Cut, kv_memory: int | None,
                  kv_cache: str = "auto", context: int = 1) -> int:
    """Pages of the KV cache that every rank of a replica can hold; with ``kv_memory`` bytes of each for the cache, if given."""
    def pages(rank: RankShare) -> int:
        room = int(cut.memory[rank.stage_index] * USABLE) - OVERHEAD - rank.weights if kv_memory is None else kv_memory
        return max(0, room) // rank.cache
    return min(map(pages, rank_shares(config, weights_format, replace(shape, data=1), PAGE, kv_cache, context, cut.stages)))


def check_pages(pages: int, pages_in_q8: int, ready: list[ReadyRequest], chosen: bool, parts: int = 1) -> None:
    """Raises UsageError for a cache of ``pages``, in so many parts, that cannot hold one of the requests alone. ``pages_in_q8``:
    how many the same memory holds with --kv-cache q8; ``chosen``: by --kv-memory."""
    longest = max(ready, key=lambda request: len(request.prompt) + request.limit)
    need = len(longest.prompt) + longest.limit
    if (most := longest_text(pages, parts)) < need:
        what = "raise --kv-memory" if chosen else "use more ranks in a replica or a smaller --weights format"
        what += ", give --kv-cache q8" if longest_text(pages_in_q8, parts) >= need else ""
        raise UsageError(f"the KV cache holds {most} tokens, but request {shown(longest.id)} needs {need} (a prompt of "
                         f"{len(longest.prompt)} and up to {longest.limit} more): {what}, or lower --max-tokens or --max-seq-len")
