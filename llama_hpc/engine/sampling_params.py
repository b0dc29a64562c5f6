"""How the tokens of one request are chosen, and when it ends."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from llama_hpc.errors import UsageError

MAX_INT32 = 2**31 - 1
# Lowest and highest value of each integer setting.
_INTEGERS = {"top_k": (0, MAX_INT32), "seed": (0, 2**64 - 1), "max_tokens": (1, MAX_INT32)}


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; checked when made, so a value that exists is a valid one.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off. ``seed`` is an unsigned 64-bit integer.
    ``max_tokens`` counts generated tokens. ``stop`` holds strings and ``stop_token_ids`` token ids that end the answer;
    ``ignore_eos`` generates past the model's own end tokens. One string is accepted for ``stop``, any iterable of
    integers for ``stop_token_ids``; both are kept as tuples. Raises UsageError with the value and the allowed range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, lambda t: t >= 0, "a finite number, 0 or more"),
            "top_p": _number("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
        }
        for name, (low, high) in _INTEGERS.items():
            checked[name] = _integer(name, getattr(self, name), low, high)
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", "true or false", self.ignore_eos)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

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
