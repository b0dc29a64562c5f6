"""The leader's side of a request: its tokens so far, when it ends, and the output it becomes."""

import time
from dataclasses import dataclass

import numpy as np

from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.engine.stop_strings import StopStrings
from llama_hpc.kernels.cpu.sampling import weigh
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.kernels.sampling import adjust, choose, largest, philox, request_key
from llama_hpc.model.wanted import Draw
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


def ends_of(params: SamplingParams, eos_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end an answer; ``eos_ids`` are the model's own."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)


class Answer:
    """A sample of a request being answered. ``decode`` (ids to text, None without a tokenizer) serves stop strings and text."""

    def __init__(self, request: ReadyRequest, sample: int, eos_ids: frozenset[int], decode, started: float):
        self.request, self.sample, self._decode = request, sample, decode
        params = request.params
        self._key = request_key(params.seed, request.id)
        self._ends = ends_of(params, eos_ids)
        self._stops = StopStrings(params.stop, decode, params.min_tokens) if params.stop else None
        # For penalties: how often the answer has each token of prompt and answer.
        self._counts: dict[int, int] = {}
        self.tokens: list[int] = []
        self.logprobs: list[np.float32] = []
        self._top_tokens: list[np.ndarray] = []
        self._top_logprobs: list[list[np.float32]] = []
        self.finish_reason = ""
        self._cut: int | None = None
        self._started, self._first_token = started, 0.0

    def extend(self, likeliest: int, maximum: np.float32, total: int, logits: np.ndarray | None) -> int:
        """Takes the likeliest token or, with ``logits`` float32 [V], chooses one; notes it and whether the answer ends with it.

        ``maximum`` is the largest raw logit, ``total`` the sum of weights relative to it.
        """
        params = self.request.params
        token = likeliest if logits is None else self._choose(logits)
        logprob = log_probability(maximum if logits is None else logits[token], maximum, total)
        if params.logprobs:
            ids = largest(logits, params.logprobs)
            self._top_tokens.append(ids)
            self._top_logprobs.append([log_probability(logit, maximum, total) for logit in logits[ids]])
        return self.take(token, logprob)

    def take(self, token: int, logprob: np.float32) -> int:
        """Notes a token that was chosen, and whether the answer ends with it; returns it."""
        params = self.request.params
        if not self.tokens:
            self._first_token = time.monotonic()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if params.penalizes:
            self._counts[token] = self._counts.get(token, 0) + 1
        if token in self._ends or self._stop_string():
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.limit:
            self.finish_reason = "length"
        return token

    def draw(self, row: int) -> Draw:
        """What the next token is chosen by, for a device whose logits have it in ``row``."""
        params = self.request.params
        biases = dict(params.logit_bias or {})
        if len(self.tokens) < params.min_tokens:
            biases |= dict.fromkeys(self._ends, -np.inf)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        return Draw(row, params.temperature, params.top_k, params.top_p, params.min_p, self._key, (self.sample, len(self.tokens)),
                    *penalties, self._occurrences() if params.penalizes else {}, biases)

    def _occurrences(self) -> dict[int, int]:
        """How often the answer has each token of prompt and answer."""
        if not self.tokens:
            # Not before: many samples may be waiting.
            self._counts = dict.fromkeys(self.request.prompt.tolist(), 0)
        return self._counts

    def _choose(self, logits: np.ndarray) -> int:
        """A token for raw logits float32 [V], which are left as they are."""
        params, index = self.request.params, len(self.tokens)
        random = philox(self._key, (self.sample, index, 0, 0))[0] if params.temperature else 0
        return choose(self._adjusted(logits), params.temperature, params.top_k, params.top_p, params.min_p, random, weigh)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Logits with penalties, then biases, and -inf for tokens that would end the answer too early."""
        params, early = self.request.params, len(self.tokens) < self.request.params.min_tokens
        if not (params.penalizes or params.logit_bias or early):
            return logits
        logits = logits.copy()
        if params.penalizes:
            counts = self._occurrences()
            adjust(logits, _integers(counts), _integers(counts.values()), params.repetition_penalty, params.frequency_penalty,
                   params.presence_penalty)
        if params.logit_bias:
            logits[_integers(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
        if early:
            # An end token of the tokenizer may lie beyond the model's vocabulary.
            logits[[token for token in self._ends if token < len(logits)]] = -np.inf
        return logits

    def _stop_string(self) -> bool:
        if self._stops is not None:
            self._cut = self._stops.find(self.tokens)
        return self._cut is not None

    def output(self, origin: float, setbacks: int = 0) -> Output:
        """The finished answer; times are seconds after ``origin``. Text ends before an end token or stop string."""
        tokens = self.tokens[:-1] if self.tokens[-1] in self._ends else self.tokens
        text = self._decode(tokens)[: self._cut] if self._decode else ""
        times = {"start": self._started - origin, "first_token": self._first_token - origin, "end": time.monotonic() - origin}
        if self.request.arrival is not None:
            times = {"arrival": self.request.arrival, **times}
        top = len(self.tokens), self.request.params.logprobs
        return Output(self.request.index, self.sample, np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), text,
                      self.finish_reason, times, setbacks, np.array(self._top_tokens, np.int32).reshape(top),
                      np.array(self._top_logprobs, np.float32).reshape(top))


def _integers(values) -> np.ndarray:
    return np.fromiter(values, np.int64, len(values))
