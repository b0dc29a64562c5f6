"""Sampling settings: what is accepted, what is refused and in which words."""

import dataclasses
import math

import numpy as np
import pytest

from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import UsageError


def test_greedy_by_default():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.0, 0, 1.0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "0.5"),
        ("temperature", True), ("temperature", 10**400), ("temperature", None), ("top_k", -1), ("top_k", 1.0),
        ("top_k", True), ("top_k", 2**31), ("top_p", 0), ("top_p", 1.0001), ("top_p", -1), ("top_p", math.nan),
        ("seed", -1), ("seed", 2**64), ("seed", False), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "8"),
        ("max_tokens", math.nan), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", {"a": 1}),
        ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("stop_token_ids", 5), ("stop_token_ids", "12"),
        ("ignore_eos", 1), ("ignore_eos", "yes"),
    ],
)  # fmt: skip
def test_refused_values_are_named(name, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    shown = value[0] if name == "stop_token_ids" and isinstance(value, list) else value
    assert name in message and "must be" in message and "\n" not in message
    assert repr(shown)[:20] in message


def test_edges_are_accepted():
    SamplingParams(temperature=0, top_p=1, seed=2**64 - 1, max_tokens=1, top_k=2**31 - 1)


def test_values_are_kept_in_one_form():
    """NumPy numbers, lists and a single stop string compare equal to the plain form, and hash."""
    given = SamplingParams(np.float32(0.5), np.int64(3), 1, np.uint64(7), stop="END", stop_token_ids=np.array([1, 2]))
    plain = SamplingParams(0.5, 3, 1.0, 7, stop=("END",), stop_token_ids=(1, 2))
    assert given == plain and hash(given) == hash(plain)
    assert type(given.seed) is int and type(given.top_p) is float


def test_override():
    params = SamplingParams(seed=3).override({"temperature": 1, "stop": ["x"], "top_k": None})
    assert params == SamplingParams(temperature=1.0, seed=3, stop=("x",))
    with pytest.raises(UsageError, match=r"'temprature'.*temperature, top_k"):
        params.override({"temprature": 1})
    with pytest.raises(UsageError, match=r"top_p must be .*, got 2"):
        params.override({"top_p": 2})
    with pytest.raises(UsageError, match="object of settings"):
        params.override([1])
