"""Choosing tokens on a GPU, which holds the logits: only tokens and log-probabilities go to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llama_hpc.kernels.cuda import sampling
from llama_hpc.kernels.cuda.sampling import DRAW, DRAW_WORDS


@dataclass(frozen=True)
class Draw:
    """One token to be chosen from ``row`` of the logits: what ``kernels.sampling.choose`` is given, with Philox's ``key`` and the
    first half of its ``counter``. ``penalties``: how often the answer has each token that is penalised; ``biases``: what is added
    to logits, -inf for what must not be drawn."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: tuple[int, int]
    counter: tuple[int, int]
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    penalties: dict[int, int] = field(default_factory=dict)
    biases: dict[int, float] = field(default_factory=dict)


class DeviceDraws:
    """Chooses from ``logits`` float32 [most, vocabulary] on a device, of which ``best`` and ``totals`` are known there; up to
    ``most`` tokens at a time. ``count``: how many it has chosen."""

    def __init__(self, device, logits, best, totals):
        self._device, self._given, self.count = device, (logits, best, totals), 0
        most = len(logits)
        self._draws, self._rows = device.zeros((most, DRAW_WORDS), np.uint64), device.zeros((1,), np.int32)
        self._tokens, self._logprobs = device.zeros((most,), np.int32), device.zeros((most,), np.float32)
        # As large as the logits: made for the first draw, which greedy answers and scores never make.
        self._scratch: sampling.Scratch | None = None
        self._lists = [device.zeros((1,), dtype) for dtype in (np.int32, np.int32, np.int32, np.float32)]

    def choose(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n], log-probabilities float32 [n]) of n draws."""
        device, n = self._device, len(draws)
        records = np.zeros(n, DRAW)
        lists: list[list] = [[] for _ in self._lists]
        for record, draw in zip(records, draws, strict=True):
            sampling.set_sampling(record, draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.key, draw.counter)
            for name in ("row", "repetition", "frequency", "presence"):
                record[name] = getattr(draw, name)
            for name, first in (("penalties", 0), ("biases", 2)):
                chosen = getattr(draw, name)
                record[name] = len(lists[first]), len(lists[first]) + len(chosen)
                lists[first] += chosen.keys()
                lists[first + 1] += chosen.values()
        device.upload(records.view(np.uint64).reshape(n, DRAW_WORDS), self._draws[:n])
        device.upload(np.array([n], np.int32), self._rows)
        for i, values in enumerate(lists):
            self._fill(i, values)
        logits, best, totals = self._given
        self._scratch = self._scratch or sampling.Scratch(device, *logits.shape)
        sampling.choose(device, logits, self._draws, *self._lists, best, totals, self._rows, n, self._tokens, self._logprobs,
                        self._scratch)
        self.count += n
        return device.download(self._tokens[:n]), device.download(self._logprobs[:n])

    def _fill(self, number: int, values: list) -> None:
        """Brings a list to the device, in an array that grows with the longest one."""
        array = self._lists[number]
        if len(values) > array.shape[0]:
            array = self._lists[number] = self._device.zeros((1 << (len(values) - 1).bit_length(),), array.dtype)
        if values:
            self._device.upload(np.array(values, array.dtype), array[: len(values)])
