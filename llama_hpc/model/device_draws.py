"""Choosing tokens on a GPU, which holds the logits: only tokens and log-probabilities go to the host."""

from collections.abc import Sequence

import numpy as np

from llama_hpc.kernels.cuda import sampling
from llama_hpc.kernels.cuda.sampling import DRAW, DRAW_WORDS
from llama_hpc.model.wanted import Draw


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

    def choose(self, draws: Sequence[Draw], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Begins to choose n tokens: ``tokens`` int32 [n] and ``logprobs`` float32 [n] or longer, pinned, have them when the
        device has done what was launched. Of logits that are not finite nothing sensible."""
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
        device.fetch(self._tokens[:n], tokens[:n])
        device.fetch(self._logprobs[:n], logprobs[:n])

    def _fill(self, number: int, values: list) -> None:
        """Brings a list to the device, in an array that grows with the longest one."""
        array = self._lists[number]
        if len(values) > array.shape[0]:
            array = self._lists[number] = self._device.zeros((1 << (len(values) - 1).bit_length(),), array.dtype)
        if values:
            self._device.upload(np.array(values, array.dtype), array[: len(values)])
