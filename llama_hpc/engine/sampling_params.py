"""How the tokens of one request are chosen, and when it ends."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from llama_hpc.errors import UsageError

MAX_INT32 = 2**31 - 1
# Lowest and highest value of each integer setting.
_INTEGERS = {"top_k": (0, MAX_INT32), "seed": (0, 2**64 - 1), "max_tokens": (1, MAX_INT32), "n": (1, 10000),
             "min_tokens": (0, MAX_INT32), "logprobs": (0, 20)}
# Of other numbers. Within these bounds no logit overflows (its own are below 2**20).
_NUMBERS = {"min_p": (0, 1), "repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
_BIAS = (-100, 100)


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; checked when made, so a value that exists is a valid one.

    Logits are changed in this order: ``repetition_penalty`` divides positive and multiplies negative logits of tokens in the
    prompt or the answer (1 is off); ``frequency_penalty``, times how often the answer has the token, is subtracted, then
    ``presence_penalty`` where it has it; ``logit_bias`` (token id to bias) is added; ``temperature`` divides, 0 is greedy. Then
    come filters: ``top_k`` (0 is off), ``top_p`` (1 is off), ``min_p``, which keeps tokens with at least that share of the weight
    of the best (0 is off). ``seed`` is an unsigned 64-bit integer; ``n`` answers are drawn for the prompt.

    ``max_tokens`` counts generated tokens. ``stop`` holds strings and ``stop_token_ids`` token ids that end the answer;
    ``ignore_eos`` generates past the model's own end tokens. Among the first ``min_tokens`` there is no end token, and no stop
    string ends in them. ``logprobs``: so many of the likeliest tokens, by raw logits, are noted at each token.

    One string is accepted for ``stop``, any iterable of integers for ``stop_token_ids``; both are kept as tuples. Ids of
    ``logit_bias`` may be decimal strings, as in JSON. Raises UsageError with the value and the allowed range, and for settings
    that contradict each other.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    n: int = 1
    min_tokens: int = 0
    logprobs: int = 0

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, lambda t: t >= 0, "a finite number, 0 or more"),
            "top_p": _number("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
            "logit_bias": _biases(self.logit_bias),
        }
        for name, (low, high) in _INTEGERS.items():
            checked[name] = _integer(name, getattr(self, name), low, high)
        for name, bounds in _NUMBERS.items():
            checked[name] = _bounded(name, getattr(self, name), *bounds)
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", "true or false", self.ignore_eos)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise UsageError(f"n must be 1 at temperature 0, where all answers are equal, got {self.n}: raise temperature")

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def needs_logits(self, generated: int) -> bool:
        """Whether the token after ``generated`` ones takes the whole row of logits, not only the likeliest token."""
        return (self.temperature > 0 or self.logprobs > 0 or self.penalizes or bool(self.logit_bias)
                or generated < self.min_tokens)

    def override(self, settings: Mapping[str, Any]) -> "SamplingParams":
        """These parameters with some replaced, as a request in a prompts file does.

        ``settings`` maps field names to JSON values; ``None`` keeps the present value. Raises UsageError for an unknown
        name (with the allowed ones) and for a value out of range.
        """
        if not isinstance(settings, Mapping):
            raise _refused("sampling", "an object of settings", settings)
        for name in settings:
            if name not in SAMPLING_NAMES:
                raise UsageError(f"unknown sampling setting {shown(name)}: allowed are {', '.join(SAMPLING_NAMES)}")
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams))


def shown(value: Any) -> str:
    """A value for a message: its repr on one line, cut at 60 characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_integer(value: Any) -> bool:
    """True for Python and NumPy integers, False for booleans."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _refused(name: str, allowed: str, value: Any) -> UsageError:
    return UsageError(f"{name} must be {allowed}, got {shown(value)}")


def _number(name: str, value: Any, accepts, allowed: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _refused(name, allowed, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and accepts(number)):
        raise _refused(name, allowed, value)
    return number


def _bounded(name: str, value: Any, low: float, high: float) -> float:
    return _number(name, value, lambda number: low <= number <= high, f"a number from {low} to {high}")


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not is_integer(value) or not low <= value <= high:
        raise _refused(name, f"an integer from {low} to {high}", value)
    return int(value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple):
        raise _refused("stop", "a string or a list of strings", value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise _refused("stop", "a list of strings that are not empty", value)
    return tuple(strings)


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise _refused("stop_token_ids", "a list of token ids", value)
    return tuple(_integer("each of stop_token_ids", token, 0, MAX_INT32) for token in value)


def _biases(value: Any) -> dict[int, float]:
    """Token ids, ascending, to biases."""
    if not isinstance(value, Mapping):
        raise _refused("logit_bias", "an object of token ids and biases", value)
    biases = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,10}", key) else key
        token = _integer("each token id of logit_bias", token, 0, MAX_INT32)
        if token in biases:
            raise UsageError(f"logit_bias has token id {token} twice: keep one")
        biases[token] = _bounded(f"logit_bias of token id {token}", bias, *_BIAS)
    return dict(sorted(biases.items()))
