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
        ("ignore_eos", 1), ("ignore_eos", "yes"), ("min_p", -0.1), ("min_p", 1.01), ("min_p", "0"), ("min_p", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf), ("repetition_penalty", 101),
        ("presence_penalty", 2.1), ("presence_penalty", -3), ("frequency_penalty", -2.1), ("frequency_penalty", True),
        ("n", 0), ("n", 10001), ("n", 2), ("n", 1.0), ("n", "2"), ("min_tokens", -1), ("min_tokens", 129), ("min_tokens", 1.5),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logit_bias", [1, 2]), ("logit_bias", "5"),
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
    SamplingParams(temperature=1, min_p=1, repetition_penalty=100, presence_penalty=-2, frequency_penalty=2, n=10000,
                   min_tokens=128, logprobs=20, logit_bias={0: -100, 2**31 - 1: 100})


def test_values_are_kept_in_one_form():
    """NumPy numbers, lists and a single stop string compare equal to the plain form, and hash."""
    given = SamplingParams(np.float32(0.5), np.int64(3), 1, np.uint64(7), stop="END", stop_token_ids=np.array([1, 2]))
    plain = SamplingParams(0.5, 3, 1.0, 7, stop=("END",), stop_token_ids=(1, 2))
    assert given == plain and hash(given) == hash(plain)
    assert type(given.seed) is int and type(given.top_p) is float


def test_biases():
    """Ids as in JSON, in one order; each wrong part is named."""
    params = SamplingParams(logit_bias={"17": 1, 3: np.float32(-0.5)})
    assert params.logit_bias == {3: -0.5, 17: 1.0} and list(params.logit_bias) == [3, 17]
    assert hash(params) == hash(SamplingParams(logit_bias={3: -0.5, 17: 1.0}))
    for bias, part in (({"a": 1}, "each token id of logit_bias must be an integer from 0 to 2147483647, got 'a'"),
                       ({-1: 1}, "got -1"), ({"5": 101}, "logit_bias of token id 5 must be a number from -100 to 100, got 101"),
                       ({5: None}, "got None"), ({5: math.nan}, "got nan"), ({"5": 1, 5: 2}, "token id 5 twice")):
        with pytest.raises(UsageError) as caught:
            SamplingParams(logit_bias=bias)
        assert part in str(caught.value)


@pytest.mark.parametrize(("settings", "needs"), [
    ({}, False), ({"top_k": 5, "top_p": 0.5, "min_p": 0.5, "stop_token_ids": [1], "ignore_eos": True}, False),
    ({"temperature": 0.1}, True), ({"logprobs": 1}, True), ({"logit_bias": {1: 1}}, True), ({"repetition_penalty": 1.1}, True),
    ({"presence_penalty": 0.1}, True), ({"frequency_penalty": -0.1}, True)])
def test_who_needs_all_logits(settings, needs):
    assert [SamplingParams(**settings).needs_logits(generated) for generated in (0, 5)] == [needs] * 2
    held_back = SamplingParams(**settings, min_tokens=5)
    assert held_back.needs_logits(4) and held_back.needs_logits(5) == needs


def test_override():
    params = SamplingParams(seed=3).override({"temperature": 1, "stop": ["x"], "top_k": None})
    assert params == SamplingParams(temperature=1.0, seed=3, stop=("x",))
    with pytest.raises(UsageError, match=r"'temprature'.*temperature, top_k"):
        params.override({"temprature": 1})
    with pytest.raises(UsageError, match=r"top_p must be .*, got 2"):
        params.override({"top_p": 2})
    with pytest.raises(UsageError, match="object of settings"):
        params.override([1])
