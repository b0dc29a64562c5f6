"""One stage of a model on a GPU: the same steps as ``transformer.TransformerStage``, by the kernels of ``kernels.cuda``.

What the engine sees of a stage lies on the host: residuals that travel between stages, logits that are asked for, the largest
logits and sums of weights. Nothing here needs Numba or MPI.
"""

from collections import deque
from contextlib import contextmanager

import numpy as np

from llama_hpc.errors import DeviceUnavailable
from llama_hpc.kernels.cuda.device import DeviceError
from llama_hpc.kernels.numerics import NOT_FINITE
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.device_cache import DeviceCache
from llama_hpc.model.device_program import DeviceProgram
from llama_hpc.model.device_step import DeviceStep, Lanes
from llama_hpc.model.faults import Faults
from llama_hpc.model.shares import StageShare, TensorShare
from llama_hpc.model.wanted import NOTHING, Wanted


class DeviceStage:
    """The part of a model that one rank computes on ``device`` (see ``kernels.cuda.device``). Collective over the tensor group.

    Sizes and ``weights`` are as for ``TransformerStage``, the weights' matrices on the device. ``reducer`` counts what is joined
    over the tensor group; with several ranks ``exchange`` does it (see ``comm.device_exchange``).

    Where ``overlaps``, the host need not wait for one step before it begins the next: while the device computes, residuals arrive
    and leave beside it, and the host sends, decides and plans.
    """

    spread_steps = overlapped_steps = 0

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights, reducer, device, *, sequences: int,
                 max_seq_len: int, max_rows: int, max_outputs: int, cache: DeviceCache, exchange=None):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        self.device, self.cache, self.exchange, self.faults = device, cache, exchange, Faults()
        # Where the host joins, it waits for every piece of a step.
        self.overlaps, self.steps_beside = exchange is None or exchange.on_stream, 0
        self._program = DeviceProgram(config, stage, share, weights, reducer, device, cache, exchange, max_seq_len, max_rows,
                                      max_outputs)
        self._lanes = Lanes(device)
        self._idle, self._begun = deque([self._make_step()]), deque()
        # The one that was finished last, and whether the device still has its logits.
        self._step, self._fresh = self._idle[0], False

    # What the engine asks of a stage.

    @property
    def draws(self):
        """Chooses tokens where this rank has all logits (see ``DeviceDraws``); else None."""
        return self._program.outputs and self._program.outputs.draws

    @property
    def replayed_steps(self) -> int:
        """Steps that were captured once and replayed."""
        return self._program.replayed

    @property
    def incoming(self) -> np.ndarray:
        """float32 [max_rows, hidden_size]: takes what enters the stage with the next step."""
        if not self._idle:
            self._idle.append(self._make_step())
        return self._idle[0].residual

    @property
    def residual(self) -> np.ndarray:
        """float32 [max_rows, hidden_size]: what leaves the stage with the step that was finished last."""
        return self._step.residual

    @property
    def best(self) -> np.ndarray:
        """int64 [max_outputs, segments]: greatest keys, of the step that was finished last, as ``totals``."""
        return self._step.best

    @property
    def totals(self) -> np.ndarray:
        """int64 [max_outputs, segments]: sums of weights (see ``kernels.sampling``)."""
        return self._step.totals

    @property
    def logits(self) -> np.ndarray:
        """float32 [max_outputs, vocabulary of this rank]: rows that were wanted of the step that was finished last; all of them
        behind ``forward``."""
        if self._fresh:
            self._fresh, count = False, self._step.outputs
            with self._told():
                self.device.download(self._program.outputs.logits[:count], self._step.logits[:count])
        return self._step.logits

    def picked(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n]: the logits of the ``tokens`` that were wanted of the first n outputs, 0 of those that others hold."""
        return self._step.picked[: len(tokens)]

    def drawn(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 tokens and float32 log-probabilities of the draws that were wanted."""
        return self._step.tokens[:count], self._step.logprobs[:count]

    def forward(self, batch) -> None:
        """As ``TransformerStage.forward``: runs the stage's layers on ``incoming``. Raises DeviceUnavailable where the device is
        lost."""
        self.begin(batch)
        self.finish()
        self._fresh = True

    def begin(self, batch, wanted: Wanted = NOTHING, fault: int = 0) -> None:
        """Launches a step; ``finish`` is to be called for each, in the same order. ``fault``: the code that came with
        ``incoming``. Raises DeviceUnavailable."""
        self.steps_beside += bool(self._begun)
        self._fresh = False
        with self._told():
            step = self._idle.popleft() if self._idle else self._make_step()
            self._begun.append(step)
            step.load(batch, fault)
            if not self.stage.first:
                step.arrive()
            self._program.run(batch, step)
            step.leave(wanted)

    def over(self) -> bool:
        """Whether ``finish`` would not wait."""
        with self._told():
            return self._begun[0].over()

    def finish(self) -> None:
        """Waits for the oldest step that has begun, and notes its first fault. Raises DeviceUnavailable."""
        self._step = step = self._begun.popleft()
        self._idle.append(step)
        with self._told():
            step.wait()
        if not self._begun:
            self._program.place = 0
        self.faults.merge(step.fault)
        if step.found.any():
            self._note(step.found)

    @contextmanager
    def _told(self):
        try:
            yield
        except DeviceError as error:
            raise DeviceUnavailable(f"{error}; --resume goes on with what is finished, on other devices too") from None

    def work(self) -> dict[str, str | int | float]:
        """What was joined over the tensor group and how, how many steps were replayed, how many were launched beside another one,
        and tokens chosen on the device."""
        chosen = {} if self.exchange is None else {"reduce": self.exchange.name}
        return self.reducer.work() | chosen | {"replayed_steps": self.replayed_steps, "steps_beside": self.steps_beside,
                                               "device_draws": self.draws.count if self.draws else 0}

    @property
    def joining(self) -> list[np.ndarray]:
        """Nanoseconds spent in joins, int64 [1]."""
        return [self.reducer.nanoseconds]

    def mark(self) -> tuple[int, ...]:
        """Changes while a step gets further. From any thread."""
        return (self._program.place,)

    def reached(self) -> str:
        """Where the step is; kernels run beside the host, which waits for all of a piece."""
        return f"piece {self._program.place} of the step on {self.device.name}" if self._program.place else ""

    def free(self) -> None:
        """Gives back what the ranks share. Collective over the tensor group."""
        self.reducer.free()

    def _make_step(self) -> DeviceStep:
        return DeviceStep(self.device, self._lanes, self.cache, self._program.arrays, arrives=not self.stage.first)

    def _note(self, found: np.ndarray) -> None:
        """The first fault, and no more of it: of steps that have begun already it would be the second one."""
        for number in np.flatnonzero(found).tolist():
            layer, tensors = self._program.names[number]
            # Both bits: not finite, which comes first.
            self.faults.note(NOT_FINITE if found[number] & NOT_FINITE else int(found[number]), tensors[0], layer)
        with self._told():
            self.device.upload(np.zeros_like(found), self._program.status)
