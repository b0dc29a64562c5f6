"""The pipeline's schedule: which steps are under way, how many there may be, and what each may hold."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.errors import UsageError
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.model.wanted import NOTHING, Wanted

_SLACK = 2                      # steps under way beyond one a stage: the outcome of one travels while others are computed
_PREFILL = 256                  # prompt tokens of a step: kernels are as fast as with more, and stages wait for each other less
MEMORY_BUDGET = 512 << 20


@dataclass(frozen=True)
class PipelineConfig:
    """``micro_batches`` steps under way at once, each with at most ``prefill_micro_batch`` prompt tokens and
    ``decode_micro_batch`` decoding sequences (0: an equal share of those that run). ``memory_budget``: bytes of a rank's
    buffers for residuals in flight.

    Raises UsageError for numbers that make no pipeline.
    """

    micro_batches: int = 4
    prefill_micro_batch: int = _PREFILL
    decode_micro_batch: int = 0
    memory_budget: int = MEMORY_BUDGET

    def __post_init__(self):
        for name, least in (("micro_batches", 1), ("prefill_micro_batch", 1), ("decode_micro_batch", 0), ("memory_budget", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @classmethod
    def for_model(cls, layers: int, hidden_size: int, memory_budget: int = MEMORY_BUDGET, stages: int = 2) -> "PipelineConfig":
        """What suits a model on ``stages`` stages (no more than ``layers``).

        For decoding, as many steps as keep all stages busy while outcomes travel: more would only make them smaller. For
        prefilling, chunks that are no larger than the budget allows for the residuals of all of them, float32 rows.
        """
        stages = min(stages, layers)
        count = stages + _SLACK if stages > 1 else 1
        rows = memory_budget // (count * hidden_size * 4)
        return cls(count, max(1, min(_PREFILL, rows)), 0, memory_budget)


class PipelineState:
    """Steps under way on ``stages`` stages, at most ``max_depth``: a queue in which all move on by one stage at a time."""

    def __init__(self, stages: int, max_depth: int):
        self.stages, self.max_depth = stages, max_depth
        self._under_way: deque[list] = deque()          # [what was pushed, stages that it has passed]

    def __len__(self) -> int:
        return len(self._under_way)

    def can_accept(self) -> bool:
        """Whether another step may begin."""
        return len(self._under_way) < self.max_depth

    def push(self, step: Any) -> None:
        """A step begins. Raises RuntimeError where none may."""
        if not self.can_accept():
            raise RuntimeError(f"{len(self)} steps are under way, no more than {self.max_depth} may be: pop one first")
        self._under_way.append([step, 0])

    def advance(self) -> None:
        """Every step under way passes a stage."""
        for entry in self._under_way:
            entry[1] = min(entry[1] + 1, self.stages)

    def has_output(self) -> bool:
        """Whether the oldest step has passed all stages."""
        return bool(self._under_way) and self._under_way[0][1] == self.stages

    def pop(self) -> Any:
        """The oldest step, which has passed all stages. Raises RuntimeError where there is none."""
        if not self.has_output():
            raise RuntimeError(f"no step has passed all {self.stages} stages yet: advance first")
        return self._under_way.popleft()[0]


class PipelineStage:
    """One rank's stage: takes what the stage before sends, computes, and sends it on. Collective over the tensor group.

    Steps are begun, and finished in the same order; several may have begun where the stage ``overlaps``.
    """

    def __init__(self, stage: TransformerStage, channel: StageChannel):
        self.stage, self.channel = stage, channel
        self._rows: deque[int] = deque()        # of the steps that have begun

    def begin(self, batch: Batch, wanted: Wanted = NOTHING, lap=lambda phase: None,
              meanwhile: Callable[[], None] | None = None) -> None:
        """Begins a step; ``meanwhile`` is called while nothing has arrived, ``lap`` with a phase (see ``metrics.PHASES``) behind
        it."""
        fault = self.channel.receive(self.stage.incoming, batch.rows, meanwhile)
        lap("receive")
        self.stage.begin(batch, wanted, fault)
        self._rows.append(batch.rows)
        lap("compute")

    def finish(self, lap=lambda phase: None) -> None:
        """Finishes the oldest step that has begun."""
        self.stage.finish()
        lap("compute")
        self.channel.send(self.stage.residual, self._rows.popleft(), self.stage.faults.code)
        lap("send")

    def run(self, batch: Batch) -> None:
        """A step alone."""
        self.begin(batch)
        self.finish()
