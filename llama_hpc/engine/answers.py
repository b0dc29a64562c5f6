"""The leader's side of a request: its tokens so far, when it ends, and the output it becomes."""

import time
from dataclasses import dataclass

import numpy as np

from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.kernels.cpu.sampling import weigh
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.kernels.sampling import choose, philox, request_key
from llama_hpc.results.schema import Output


@dataclass(frozen=True)
class ReadyRequest:
    """A request as the engine needs it: prompt token ids (int32), settings, how many tokens it may generate, when it arrives."""

    index: int
    id: str
    prompt: np.ndarray
    params: SamplingParams
    limit: int
    arrival: float | None = None        # seconds after the start of the job; None: there from the start


def draw(logits: np.ndarray, params: SamplingParams, key: tuple[int, int], index: int) -> int:
    """A token for float32 logits [V] of a whole row; ``index`` counts the answer's tokens."""
    random = philox(key, (0, index, 0, 0))[0] if params.temperature else 0
    return choose(logits, params.temperature, params.top_k, params.top_p, random, weigh)


class Answer:
    """One request being answered. ``decode`` (ids to text, or None without a tokenizer) serves stop strings and the text."""

    def __init__(self, request: ReadyRequest, eos_ids: frozenset[int], decode, started: float):
        self.request, self._decode = request, decode
        self._key = request_key(request.params.seed, request.id)
        self._ends = frozenset(request.params.stop_token_ids) | (frozenset() if request.params.ignore_eos else eos_ids)
        self.tokens: list[int] = []
        self.logprobs: list[np.float32] = []
        self.finish_reason = ""
        self._cut: int | None = None
        self._started, self._first_token = started, 0.0

    def extend(self, likeliest: int, maximum: np.float32, total: int, logits: np.ndarray | None) -> int:
        """Takes the likeliest token or, with ``logits`` float32 [V], samples one; notes it and whether the answer ends with it.

        ``maximum`` is the largest raw logit, ``total`` the sum of weights relative to it.
        """
        params = self.request.params
        token = likeliest if logits is None else draw(logits, params, self._key, len(self.tokens))
        logprob = log_probability(maximum if logits is None else logits[token], maximum, total)
        if not self.tokens:
            self._first_token = time.monotonic()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._ends or (params.stop and self._stop_string()):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.limit:
            self.finish_reason = "length"
        return token

    def _stop_string(self) -> bool:
        text = self._decode(self.tokens)
        found = [at for stop in self.request.params.stop if (at := text.find(stop)) >= 0]
        self._cut = min(found, default=None)
        return bool(found)

    def output(self, origin: float, setbacks: int = 0) -> Output:
        """The finished answer; times are seconds after ``origin``. Text ends before an end token or stop string."""
        tokens = self.tokens[:-1] if self.tokens[-1] in self._ends else self.tokens
        text = self._decode(tokens)[: self._cut] if self._decode else ""
        times = {"start": self._started - origin, "first_token": self._first_token - origin, "end": time.monotonic() - origin}
        if self.request.arrival is not None:
            times = {"arrival": self.request.arrival, **times}
        return Output(self.request.index, 0, np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), text,
                      self.finish_reason, times, setbacks)
