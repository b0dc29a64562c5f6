"""How a model is laid out over ranks: settings for whole models, and for products that ranks share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape

if TYPE_CHECKING:
    from llama_hpc.model.config import ModelConfig

STRATEGIES = ("auto", "data", "pipeline", "tensor", "3d")


@dataclass(frozen=True, init=False)
class ParallelConfig:
    """``data`` replicas x ``stages`` of the pipeline x ``tensor`` ranks that split every layer.

    ``strategy``: ``auto`` (what memory allows, see ``auto_grid``; the default where no number is given), ``data`` (every rank is
    a replica), ``pipeline`` or ``tensor`` (replicas of so many stages, or tensor ranks; 1 means all ranks), ``3d`` (exactly the
    three numbers, the default where one is given). ``micro_batches``: steps under way at once on the pipeline, None: by the
    number of stages. No layout changes a bit of a result. Raises UsageError for what cannot be meant.
    """

    data: int
    stages: int
    tensor: int
    strategy: str
    micro_batches: int | None

    def __init__(self, data: int = 1, pipeline: int = 1, tensor: int = 1, strategy: str | None = None,
                 micro_batches: int | None = None):
        sizes = {"data": data, "pipeline": pipeline, "tensor": tensor}
        for name, value in sizes.items() | {("micro_batches", 1 if micro_batches is None else micro_batches)}:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        strategy = strategy or ("auto" if max(sizes.values()) == 1 else "3d")
        if strategy not in STRATEGIES:
            raise UsageError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        for name, value in sizes.items():
            if strategy != "3d" and value > 1 and name != strategy:
                raise UsageError(f"strategy {strategy} leaves no choice of {name}, got {value}: use strategy 3d")
        fields = {"data": data, "stages": pipeline, "tensor": tensor, "strategy": strategy, "micro_batches": micro_batches}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def pipeline(cls, micro_batches: int | None = None, stages: int = 1) -> ParallelConfig:
        """A pipeline of all ranks, or replicas of ``stages`` stages; ``micro_batches`` steps are under way at once."""
        return cls(pipeline=stages, strategy="pipeline", micro_batches=micro_batches)

    @classmethod
    def tensor_parallel(cls, size: int = 1) -> ParallelConfig:
        """Replicas of ``size`` ranks that split every layer; 1: all ranks."""
        return cls(tensor=size, strategy="tensor")

    @classmethod
    def for_model(cls, config: ModelConfig, ranks: int | None = None, *, weights: str = "q8", memory: int | None = None,
                  max_seqs: int = 64, max_seq_len: int = 2048) -> ParallelConfig:
        """As many replicas of a model as memory allows, each with a cache for ``max_seqs`` sequences of ``max_seq_len`` tokens.

        ``ranks``: by default those that the launcher started; ``memory``: bytes of each, by default its share of what this node
        has left. Ranks are taken to be on one node. Raises UsageError where no grid holds the model.
        """
        from llama_hpc.engine.layout import auto_grid
        from llama_hpc.runtime.launch import expected_tasks, local_tasks
        from llama_hpc.runtime.topology import available_memory
        ranks = ranks or expected_tasks() or 1
        memory = available_memory() // local_tasks() if memory is None else memory
        shape = auto_grid(config, weights, ranks, ranks, memory, ranks * max_seqs, max_seqs, max_seq_len)
        return cls(shape.data, shape.pipeline, shape.tensor, "3d")

    def shape(self, ranks: int) -> GridShape | None:
        """The grid on so many ranks; None where memory is to choose it. Raises UsageError where there is none."""
        if self.strategy == "auto":
            return None
        if self.strategy == "3d":
            shape = GridShape(self.data, self.stages, self.tensor)
        elif self.strategy == "data":
            shape = GridShape(ranks if self.data == 1 else self.data, 1, 1)
        elif self.strategy == "pipeline":
            stages = ranks if self.stages == 1 else self.stages
            shape = GridShape(max(1, ranks // stages), stages, 1)
        else:
            tensor = ranks if self.tensor == 1 else self.tensor
            shape = GridShape(max(1, ranks // tensor), 1, tensor)
        shape.check_size(ranks)
        return shape


@dataclass(frozen=True)
class TensorParallelConfig:
    """One of ``world_size`` tensor ranks: which of n things, dealt in contiguous runs that differ by at most one, are its own.

    Pure arithmetic, the same as for a model's heads and blocks. Raises UsageError for a rank that there is none of.
    """

    world_size: int = 1
    rank: int = 0

    def __post_init__(self):
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} of {self.world_size}: ranks are 0 to world_size - 1, of one or more")

    def share(self, n: int) -> range:
        """The own part of n things."""
        from llama_hpc.model.shares import part
        return part(n, self.world_size, self.rank)

    def local_size(self, n: int) -> int:
        """How many of n things are its own."""
        return len(self.share(n))

    def local_offset(self, n: int) -> int:
        """How many of n things the ranks before it have."""
        return self.share(n).start


class TensorParallelStrategy(Enum):
    """How ranks share the weights [outputs, inputs] of a product: its outputs, its inputs, or nothing."""

    COLUMN = "column"
    ROW = "row"
    NONE = "none"

    def share(self, outputs: int, inputs: int, parallel: TensorParallelConfig, block: int = 1) -> tuple[slice, slice]:
        """Rows and columns of the weights that a rank holds; ``block``: inputs are dealt in whole blocks of so many."""
        rows, columns = slice(0, outputs), slice(0, inputs)
        if self is TensorParallelStrategy.COLUMN:
            own = parallel.share(outputs)
            rows = slice(own.start, own.stop)
        elif self is TensorParallelStrategy.ROW:
            own = parallel.share(-(-inputs // block))
            columns = slice(own.start * block, min(own.stop * block, inputs))
        return rows, columns
