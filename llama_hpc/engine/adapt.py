"""Limits of steps that follow what is measured: long steps keep decoding sequences waiting, uneven ones keep stages waiting.

Only the leader measures and decides; its limits travel with the outcomes, so that all ranks plan alike. What a step holds never
changes an answer.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from llama_hpc.engine.latency import Target
from llama_hpc.engine.scheduler import StepLimits

WINDOW = 16                     # steps between two decisions
BUBBLE = 0.06                   # share of waiting on a pipeline that calls for smaller prefill micro-batches
LEAST = 16                      # prompt tokens of a step
_SHRINK, _GROW = 0.7, 1.25


class Adapter:
    """Changes ``limits`` within those given: the prompt tokens of a step, and its budget with them.

    ``targets``: of ``--slo``; ``depth``: steps under way. A sequence gets a token from one in so many steps, which together must
    not take longer than the time per output token that is asked for.
    """

    def __init__(self, limits: StepLimits, max_seqs: int, targets: Sequence[Target], depth: int):
        self._most = self.limits = limits
        self._max_seqs, self._depth = max_seqs, depth
        self._tpot = min((target.limit for target in targets if target.metric == "tpot"), default=float("inf"))
        self._steps: deque[tuple[float, float]] = deque()

    def observe(self, seconds: float, waited: float) -> StepLimits:
        """One step took ``seconds`` on this rank, of which it ``waited`` for others; returns the limits from now on."""
        self._steps.append((seconds, waited))
        if len(self._steps) == WINDOW:
            period = median(seconds for seconds, _ in self._steps)
            bubble = sum(waited for _, waited in self._steps) / sum(seconds for seconds, _ in self._steps)
            late, uneven = period * self._depth > self._tpot, self._depth > 1 and bubble > BUBBLE
            self._scale(_SHRINK if late or uneven else _GROW)
            self._steps.clear()
        return self.limits

    def _scale(self, factor: float) -> None:
        most = self._most
        prefill = min(max(int(self.limits.prefill * factor), LEAST), most.prefill)
        self.limits = replace(self.limits, prefill=prefill, token_budget=min(most.token_budget, prefill + self._max_seqs))
