"""Where the time of a rank goes, step by step: recorded cheaply, summed up exactly, kept for the result file and the trace."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What a rank does in a step, in this order. ``outcome``: waits for the leader's decisions; ``receive`` and ``send``: activations;
# ``compute``: kernels, without ``reduce``: joins with tensor ranks, in the midst of computing; ``gather``: logits and faults;
# ``decide``: samples, on the leader; ``idle``: nothing to do before the next request arrives.
PHASES = ("outcome", "schedule", "receive", "compute", "send", "gather", "decide", "idle", "reduce")
_IN_TURN = PHASES[:7]
WAITING = ("outcome", "receive")        # a stage with nothing to do: the bubble of the pipeline
_NUMBER = {phase: number for number, phase in enumerate(PHASES)}
# What a step held: rows, of which prompts' are prefill; sequences that run and wait; pages of the cache that are held.
COUNTS = ("rows", "prefill", "running", "waiting", "pages")

_KEPT = 1 << 13                 # steps; of more, every second is dropped, then every second of those, …


@dataclass(frozen=True)
class RankMetrics:
    """What one rank recorded: ``starts`` float64 [steps] seconds after the origin, ``phases`` float32 [steps, phases] seconds,
    ``counts`` int32 [steps, counts] of every ``stride``-th step; ``totals`` seconds of each phase over all steps."""

    starts: np.ndarray
    phases: np.ndarray
    counts: np.ndarray
    stride: int
    totals: dict[str, float]
    seconds: float              # from the first step's start to the last one's end
    end: float                  # seconds after the origin
    peak_memory: int            # bytes

    @property
    def bubble(self) -> float:
        """Share of the time in which it waited for other stages or the leader."""
        return sum(self.totals[phase] for phase in WAITING) / self.seconds if self.seconds else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time in which its kernels ran."""
        return self.totals["compute"] / self.seconds if self.seconds else 0.0


class Recorder:
    """A stopwatch for the phases of steps. ``origin``: time.monotonic() of second 0; ``reduce_nanoseconds``: spent in joins so
    far, an int64 [1] of each kind of them."""

    def __init__(self, origin: float, reduce_nanoseconds: Sequence[np.ndarray]):
        self._origin = int(origin * 1e9)
        self._reduced, self._reduced_before = reduce_nanoseconds, 0
        # Integers of Python, nanoseconds: adding to one in an array takes three times as long.
        self._laps, self._totals = [0] * len(PHASES), [0] * len(PHASES)
        self._rows = np.zeros((_KEPT, 1 + len(PHASES) + len(COUNTS)), np.int64)     # start, phases, counts
        self._kept, self._stride, self._steps = 0, 1, 0
        self._first = self._start = self._last = 0

    def begin(self) -> None:
        """A step begins; what came before the first one does not count."""
        now = time.monotonic_ns()
        self._start = self._last = now
        self._first = self._first or now

    def lap(self, phase: str) -> None:
        """What was done since the last lap was this phase."""
        now = time.monotonic_ns()
        self._laps[_NUMBER[phase]] += now - self._last
        self._last = now

    def mark(self) -> tuple[int, int]:
        """Changes with every lap. From any thread."""
        return self._steps, self._last

    def now(self) -> tuple[int, str]:
        """The number of the step (0 before the first one) and the phase that this rank is in. From any thread."""
        behind = [phase for phase, spent in zip(_IN_TURN, self._laps, strict=False) if spent]
        place = _IN_TURN.index(behind[-1]) + 1 if behind else 0
        return self._steps + (self._first > 0), _IN_TURN[min(place, len(_IN_TURN) - 1)]

    def step_seconds(self) -> tuple[float, float]:
        """How long this step has taken up to the last lap, and for how much of it this rank waited."""
        return (self._last - self._start) / 1e9, sum(self._laps[_NUMBER[phase]] for phase in WAITING) / 1e9

    def end(self, counts: Sequence[int]) -> None:
        """The step is over; ``counts`` as in COUNTS."""
        laps, reduced = self._laps, 0
        for spent in self._reduced:
            reduced += int(spent[0])
        laps[_NUMBER["reduce"]] = reduced - self._reduced_before
        laps[_NUMBER["compute"]] -= reduced - self._reduced_before
        self._reduced_before = reduced
        if self._steps % self._stride == 0 and self._kept == _KEPT:
            self._rows[: _KEPT // 2] = self._rows[::2]
            self._kept, self._stride = _KEPT // 2, 2 * self._stride
        if self._steps % self._stride == 0:
            self._rows[self._kept] = self._start - self._origin, *laps, *counts
            self._kept += 1
        self._steps += 1
        for phase, spent in enumerate(laps):
            self._totals[phase] += spent
            laps[phase] = 0

    def result(self) -> RankMetrics:
        """What was recorded so far."""
        starts, phases, counts = np.split(self._rows[: self._kept], [1, 1 + len(PHASES)], axis=1)
        totals = {phase: total / 1e9 for phase, total in zip(PHASES, self._totals, strict=True)}
        return RankMetrics(starts[:, 0] / 1e9, (phases / 1e9).astype(np.float32), counts.astype(np.int32), self._stride, totals,
                           (self._last - self._first) / 1e9, (self._last - self._origin) / 1e9, peak_memory())


def peak_memory() -> int:
    """The most bytes that this process has had in memory (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spread(values: Sequence[float]) -> float:
    """By how much of their mean values differ at most; 0 for none."""
    mean = sum(values) / len(values) if values else 0
    return (max(values) - min(values)) / mean if mean else 0.0
