"""Tokens drawn on a device are those of ``kernels.sampling``."""

from itertools import product

import numpy as np
import pytest
from test_cuda_sampling import rows_of_logits

from llama_hpc.kernels import sampling
from llama_hpc.kernels.cuda.sampling import DRAW, DRAW_WORDS, Scratch, choose, find_best, find_totals, set_sampling
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.kernels.sampling import SEGMENT, adjust, philox

LAST = 2**64 - 1
SETTINGS = [dict(zip(("top_k", "top_p", "min_p"), values, strict=True))
            for values in product((0, 1, 40, 5000), (1.0, 0.9, 1e-12), (0.0, 0.05, 1.0))]


def case(row, number=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalties=(), biases=(), factors=(1.0, 0.0, 0.0)):
    """A draw. penalties: (token, occurrences) each; biases: (token, bias) each; factors: repetition, frequency, presence."""
    return {"row": row, "key": (number * 0x9E3779B97F4A7C15 & LAST, number), "counter": (number % 3, number), "factors": factors,
            "settings": (temperature, top_k, top_p, min_p), "penalties": list(penalties), "biases": list(biases)}


def on_device(device, logits, cases, spare=1):
    """Tokens, their log-probabilities, and the adjusted logits of the device."""
    count, size = logits.shape
    draws, lists = np.zeros(len(cases) + spare, DRAW), {"penalties": [], "biases": []}
    for draw, given in zip(draws, cases, strict=False):
        set_sampling(draw, *given["settings"], given["key"], given["counter"])
        draw["row"], (draw["repetition"], draw["frequency"], draw["presence"]) = given["row"], given["factors"]
        for name, entries in lists.items():
            draw[name] = len(entries), len(entries) + len(given[name])
            entries.extend(given[name])
    def columns(name, dtype):
        tokens, values = zip(*lists[name], strict=True) if lists[name] else ((0,), (0,))
        return device.upload(np.array(tokens, np.int32)), device.upload(np.array(values, dtype))
    everything, rows = (device.upload(np.array([n], np.int32)) for n in (count, len(cases)))
    best, totals = (device.zeros((count, -(-size // SEGMENT)), np.int64) for _ in range(2))
    there = device.upload(logits)
    find_best(device, there, 0, everything, count, best)
    find_totals(device, there, best, everything, count, totals)
    tokens, logprobs = device.zeros(len(draws), np.int32), device.zeros(len(draws), np.float32)
    scratch = Scratch(device, len(draws), size)
    for array in (scratch.adjusted, scratch.best, scratch.counts, scratch.sums):
        device.upload(np.full(array.shape, 77, array.dtype), array)
    choose(device, there, device.upload(draws.view(np.uint64).reshape(-1, DRAW_WORDS)), *columns("penalties", np.int32),
           *columns("biases", np.float32), best, totals, rows, len(draws), tokens, logprobs, scratch)
    assert not device.download(tokens)[len(cases) :].any() and device.download(there).tobytes() == logits.tobytes()
    return [device.download(array)[: len(cases)] for array in (tokens, logprobs, scratch.adjusted)]


def by_the_rule(logits, given):
    row, (ids, counts) = logits[given["row"]], (zip(*given["penalties"], strict=True) if given["penalties"] else ((), ()))
    adjusted, weights = row.copy(), np.empty(row.shape, np.int64)
    adjust(adjusted, np.array(ids, np.int64), np.array(counts, np.int64), *given["factors"])
    for token, bias in given["biases"]:
        adjusted[token] += np.float32(bias)
    token = sampling.choose(adjusted, *given["settings"], philox(given["key"], (*given["counter"], 0, 0))[0])
    maximum, total = sampling.weigh(row, weights)
    return token, log_probability(row[token], maximum, total), adjusted


def assert_same_choices(device, logits, cases):
    found = on_device(device, logits, cases)
    for values, expected in zip(found, zip(*(by_the_rule(logits, given) for given in cases), strict=True), strict=True):
        assert values.tobytes() == np.array(expected, values.dtype).tobytes()
    return found[0].tolist()


@pytest.mark.parametrize("size", [1, 7, 512])
def test_small_vocabularies(device, size):
    logits = rows_of_logits(size)
    assert_same_choices(device, logits, [case(i % len(logits), i, **settings) for i, settings in enumerate(SETTINGS * 2)])


@pytest.mark.parametrize("size", [4097, 32000])
def test_large_vocabularies(device, size):
    logits = rows_of_logits(size)
    assert_same_choices(device, logits, [case(i % len(logits), i, **settings) for i, settings in enumerate(SETTINGS)])


@pytest.mark.parametrize("size", [128256, 262144])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_vocabularies_of_models(gpu, size, temperature):
    logits = rows_of_logits(size)[:3]
    cases = [case(i % 3, i, temperature, **settings) for i, settings in enumerate(SETTINGS * 2)]
    assert_same_choices(gpu, logits, cases)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-38, 1e-12, 0.3, 2.7, 1e12, 1e39, 1.7976931348623157e308])
def test_temperatures(device, temperature):
    """Of equal logits, of neighbours that division makes equal, and of those whose distance it makes as large as can be."""
    rows = rows_of_logits(600)
    rows[0, :8] = -(2.0**20) + 1, 300, 1e-30, 300.25, 300.25 - 2**-15, 0, 300.25, -7
    settings = {}, {"top_k": 3}, {"top_p": 0.4, "min_p": 0.1}
    assert_same_choices(device, rows, [case(i % 6, i, temperature, **settings[i % 3]) for i in range(12)])


def test_random_numbers(device):
    """Of 4,096 equal logits a draw takes the one that the upper bits of its random number tell."""
    cases = [case(0, number, 1e30) for number in range(40)]
    cases += [case(0) | {"key": (LAST, LAST), "counter": (LAST, LAST)}]
    tokens = assert_same_choices(device, np.zeros((1, 4096), np.float32), cases)
    assert tokens == [philox(c["key"], (*c["counter"], 0, 0))[0] >> 52 for c in cases]


def test_penalties_and_biases(device):
    """Some tokens of either list in each segment of the vocabulary, some in both, one beyond it; some that must not be drawn."""
    logits, rng = rows_of_logits(5000), np.random.default_rng(3)
    cases = []
    for number, factors in enumerate([(1.3, 0.0, 0.0), (0.7, 0.37, 0.0), (1.0, -0.2, 0.9), (1.15, 0.4, -1.3)] * 2):
        named = rng.choice(5000, 300, replace=False).tolist()
        penalties = [(token, int(rng.integers(4))) for token in named]
        biases = [(token, (-np.inf, 2.5, -1.0)[token % 3]) for token in named[::7]] + [(logits[number % 2].argmax(), -np.inf)]
        temperature = 0.0 if number == 3 else 0.8
        cases.append(case(number % 2, number, temperature, factors=factors, penalties=penalties,
                          biases=dict(biases).items(), top_p=0.95))
    assert_same_choices(device, logits, cases)
    found = on_device(device, logits, [case(0, penalties=[(5000, 3)], biases=[(9999, 8.0)], factors=(2.0, 1.0, 1.0))])
    assert [values[0] for values in found[:2]] == list(by_the_rule(logits, case(0))[:2])


def test_top_p_at_the_exact_share(device):
    """Weights 2**32 and 2**31. The first is short of the share by half a unit, or just enough."""
    logits = np.array([[0, np.log(0.5)]], np.float32)
    weights = np.empty(2, np.int64)
    assert sampling.weigh(logits[0], weights)[1] == 3 << 31
    short, enough = (2**33 + 1) // 3, (2**33 - 2) // 3
    for share, reached in ((short, {0, 1}), (enough, {0})):
        assert set(assert_same_choices(device, logits, [case(0, i, top_p=share / 2**32) for i in range(20)])) == reached


def test_what_is_not_finite_ends(device):
    """Nothing is said of the tokens, but that they are tokens."""
    logits = rows_of_logits(600)
    logits[0] = np.nan
    logits[1, 5], logits[2, 7], logits[3] = np.nan, np.inf, -np.inf
    tokens = on_device(device, logits, [case(i % 4, i, **settings) for i, settings in enumerate(SETTINGS)])[0].tolist()
    assert all(0 <= token < 600 for token in tokens)
