"""A step's way to a device and back: several may be on it at once, while the device computes one after the other."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_hpc.kernels.cuda import sampling
from llama_hpc.model.device_cache import DeviceCache
from llama_hpc.model.device_draws import DeviceDraws
from llama_hpc.model.wanted import Wanted


class Lanes:
    """Streams beside the one that computes: residuals arrive on one, and leave on the other."""

    def __init__(self, device):
        self.arriving, self.leaving = device.new_stream(), device.new_stream()


class DeviceOutputs:
    """What the last stage finds, on the device: ``logits`` float32 [outputs, tokens of this rank, from ``first_token`` on], the
    greatest keys ``best`` of their segments and the sums ``totals``, both int64 [outputs, segments]. ``count`` int32 [1] on the
    device: outputs of a step. ``draws``: chooses tokens, where the rank has all logits."""

    def __init__(self, device, outputs: int, held: range, segments: int, count, draws: bool):
        self.first_token, self.count = held.start, count
        self.logits = device.zeros((outputs, len(held)), np.float32)
        self.best, self.totals = (device.zeros((outputs, segments), np.int64) for _ in range(2))
        self.tokens, self.picked = device.zeros((outputs,), np.int32), device.zeros((outputs,), np.float32)
        self.draws = DeviceDraws(device, self.logits, self.best, self.totals) if draws else None


@dataclass(frozen=True)
class StepArrays:
    """What the kernels of a stage work on, on the device: ``given`` int32 (see ``DeviceStep``), ``residual`` float32 [rows,
    hidden_size], ``status`` int32 of each operation, the ``outputs`` of the last stage."""

    given: Any
    residual: Any
    status: Any
    outputs: DeviceOutputs | None


class DeviceStep:
    """Places for one step: pinned memory of the host, which is its own until the step is over, and residuals on the device.

    ``given``: counts of rows and of outputs, then row by row token, sequence and position, then the selected rows. ``arrives``:
    whether another stage sends the residual.
    """

    def __init__(self, device, lanes: Lanes, cache: DeviceCache, there: StepArrays, arrives: bool):
        self.device, self.lanes, self.cache, self.there = device, lanes, cache, there
        def pinned(array) -> np.ndarray:
            return device.pinned(array.shape, array.dtype)
        self.given, self.table, self.residual, self.found = map(pinned, (there.given, cache.table, there.residual, there.status))
        rows, hidden = there.residual.shape
        self._arrived = device.zeros((rows if arrives else 0, hidden), np.float32)
        self._left = device.zeros((0 if there.outputs else rows, hidden), np.float32)
        if found := there.outputs:
            self.best, self.totals, self.picked, self.tokens = map(pinned, (found.best, found.totals, found.picked, found.tokens))
            self.logprobs = pinned(found.picked)
        self._logits: np.ndarray | None = None
        self._here, self._computed, self._over = (device.new_event() for _ in range(3))
        self.rows = self.outputs = self.fault = 0

    @property
    def logits(self) -> np.ndarray:
        """float32 [outputs, vocabulary of this rank]; made when somebody wants some."""
        if self._logits is None:
            shape = self.there.outputs.logits.shape if self.there.outputs else (0, 0)
            self._logits = self.device.pinned(shape, np.float32)
        return self._logits

    def load(self, batch, fault: int) -> None:
        """Takes over a batch, and sends it to the device behind the steps that were launched. ``fault``: of an earlier stage."""
        rows, outputs, given, most = batch.rows, len(batch.outputs), self.given, len(self.residual)
        self.rows, self.outputs, self.fault = rows, outputs if self.there.outputs else 0, fault
        given[:2] = rows, outputs
        for i, values in enumerate((batch.tokens, batch.sequences, batch.positions)):
            given[2 + i * most : 2 + i * most + rows] = values[:rows]
        given[2 + 3 * most :][:outputs] = batch.outputs
        self.device.upload(given, self.there.given)
        self.cache.update(self.table)

    def arrive(self) -> None:
        """Sends ``residual`` to the device, while the step before is still being computed there."""
        device, rows = self.device, self.rows
        device.upload(self.residual[:rows], self._arrived[:rows], self.lanes.arriving)
        device.record(self._here, self.lanes.arriving)
        device.follow(self._here)
        device.copy(self._arrived[:rows], self.there.residual[:rows])

    def leave(self, wanted: Wanted) -> None:
        """Behind the step's kernels: brings to the host what other stages, or everybody, asks for, and what is ``wanted``."""
        device, rows = self.device, self.rows
        device.fetch(self.there.status, self.found)
        if self.there.outputs:
            self._bring(self.there.outputs, wanted)
            device.record(self._over)
            return
        device.copy(self.there.residual[:rows], self._left[:rows])
        device.record(self._computed)
        device.follow(self._computed, self.lanes.leaving)
        device.fetch(self._left[:rows], self.residual[:rows], self.lanes.leaving)
        device.record(self._over, self.lanes.leaving)

    def _bring(self, found: DeviceOutputs, wanted: Wanted) -> None:
        device, outputs, picked = self.device, self.outputs, len(wanted.tokens)
        if not outputs:
            return
        device.fetch(found.best[:outputs], self.best[:outputs])
        device.fetch(found.totals[:outputs], self.totals[:outputs])
        if picked:
            device.upload(wanted.tokens.astype(np.int32), found.tokens[:picked])
            sampling.pick(device, found.logits, found.first_token, found.tokens, found.count, picked, found.picked)
            device.fetch(found.picked[:picked], self.picked[:picked])
        if wanted.rows:
            span = slice(wanted.rows[0], wanted.rows[-1] + 1)
            device.fetch(found.logits[span], self.logits[span])
        if wanted.draws:
            found.draws.choose(wanted.draws, self.tokens, self.logprobs)

    def over(self) -> bool:
        """Whether everything has come back."""
        return self.device.passed(self._over)

    def wait(self) -> None:
        """Until everything has come back."""
        self.device.wait(self._over)
