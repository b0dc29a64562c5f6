"""Choosing tokens: random numbers, weights, order, top-k and top-p, distribution, temperatures, log-probabilities."""

import hashlib
import math
import warnings
from itertools import accumulate

import numpy as np
import pytest
from kernel_inputs import assert_same, normal

from llama_hpc.kernels.cpu.sampling import weigh as cpu_weigh
from llama_hpc.kernels.numerics import exp, log_probability
from llama_hpc.kernels.reference import weigh as plain_weigh
from llama_hpc.kernels.sampling import adjust, choose, chosen_logprob, largest, philox, request_key

LAST = 2**64 - 1
WEIGHTS = pytest.mark.parametrize("weigh", [cpu_weigh, plain_weigh], ids=["cpu", "reference"])


def draws(n, seed=1):
    """64-bit random numbers as the engine takes them: one a token."""
    key = request_key(seed, "a request")
    return [philox(key, (0, index, 0, 0))[0] for index in range(n)]


def weights_of(logits, weigh=cpu_weigh):
    weights = np.empty(logits.shape, np.int64)
    maximum, total = weigh(logits, weights)
    return maximum, int(total), weights


@pytest.mark.parametrize("key", [(0, 0), (1, 2**63 + 5), (LAST, LAST)])
@pytest.mark.parametrize("counter", [(0, 0, 0, 0), (0, 1, 0, 0), (3, 70000, 0, 0), (LAST, LAST, 7, LAST)])
def test_philox_is_that_of_numpy(key, counter):
    """NumPy adds one to its counter before the first block."""
    number = sum(word << 64 * i for i, word in enumerate(counter))
    numpy = np.random.Philox(counter=(number - 1) % 2**256, key=key[0] | key[1] << 64)
    assert list(philox(key, counter)) == [int(word) for word in numpy.random_raw(4)]


def test_the_key_is_the_seed_and_the_id():
    assert request_key(7, "prompt é") == (7, int.from_bytes(hashlib.sha256("prompt é".encode()).digest()[:8], "little"))
    assert request_key(2**64 - 1, "")[0] == 2**64 - 1


@pytest.mark.parametrize("size", [1, 15, 17, 1000, 49152])
@pytest.mark.parametrize("spread", [0, 1, 30, 1e5])
def test_weights(size, spread):
    """Both builds agree in every bit, and with float64."""
    logits = normal(size, 2) * np.float32(spread) + np.float32(11)
    maximum, total, weights = weights_of(logits)
    assert (maximum, total) == (logits.max(), int(weights.sum()))
    plain = weights_of(logits, plain_weigh)
    assert plain[:2] == (maximum, total)
    assert_same(weights, plain[2])
    difference = (logits - logits.max()).astype(np.float64)
    np.testing.assert_allclose(weights, np.exp(difference) * 2**32, rtol=2e-7, atol=1)
    assert weights.max() == 2**32


def test_order_is_descending_with_ties_by_id():
    logits = np.array([0.0, -1, 3, -0.0, 3, 1e-45, -1e-45, -3e38, 1e6, -1, 3e38], np.float32)
    coarse = np.rint(normal(5000) * 20).astype(np.float32) / 8
    for values in (logits, coarse, np.append(coarse, np.float32(-np.inf))):
        order = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))
        for count in (1, 2, 7, 300, len(values), len(values) + 5):
            assert largest(values, count).tolist() == order[:count]


def plain_choose(logits, temperature, top_k, top_p, min_p, random):
    """The same choice one token at a time, in Python's integers."""
    scaled = logits / np.float32(temperature)
    weight = [int(w) for w in np.rint(exp(scaled - scaled.max()) * np.float32(2**32))]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    sums = list(accumulate(weight[token] for token in order))
    cut = next(place for place, total in enumerate(sums, 1) if total * 2**32 >= round(top_p * 2**32) * sums[-1])
    kept = [token for token in order[:cut] if weight[token] * 2**32 >= round(min_p * 2**32) * weight[order[0]]]
    sums = list(accumulate(weight[token] for token in kept))
    return next(token for token, total in zip(kept, sums, strict=True) if random * sums[-1] >> 64 < total)


@WEIGHTS
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.999999, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 1e-6, 0.2, 1.0])
def test_choice_follows_the_plain_rule(temperature, top_k, top_p, min_p, weigh):
    for seed in range(2):
        logits = np.rint(normal(40, seed) * 8) / np.float32(4)              # with ties
        for random in [0, 1, LAST, *draws(5, seed)]:
            assert choose(logits, temperature, top_k, top_p, min_p, random, weigh) == plain_choose(
                logits, temperature, top_k, top_p, min_p, random)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
def test_choice_in_a_large_vocabulary(spread):
    """However many tokens have to be put in order: flat logits need nearly all, those with ties and -inf too."""
    for seed, step in ((0, 0), (1, 0.5)):
        logits = normal(20000, seed) * np.float32(spread)
        if step:
            logits = np.rint(logits / np.float32(step)) * np.float32(step)
            logits[::7] = -np.inf
        for top_k, top_p, min_p in [(0, 1.0, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.3), (5000, 0.9, 0.001), (300, 1.0, 0.0)]:
            for random in [0, 1, LAST, *draws(2, seed)]:
                token = choose(logits, 1.0, top_k, top_p, min_p, random, cpu_weigh)
                assert token == plain_choose(logits, 1.0, top_k, top_p, min_p, random)
                assert logits[token] > -np.inf


def test_min_p_keeps_what_is_near_the_best():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25])).astype(np.float32)
    def reached(**settings):
        values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
        return {choose(logits, random=random, **values) for random in [0, LAST, *draws(200)]}
    assert reached(min_p=0.19) == {0, 1, 2, 3} and reached(min_p=0.21) == {1, 2, 3}
    assert reached(min_p=0.49) == {1, 3} and reached(min_p=0.51) == reached(min_p=1.0) == {1}
    # Of the best one's weight, not of what top-k has left; after the temperature.
    assert reached(top_k=2, min_p=0.49) == {1, 3} and reached(temperature=2.0, min_p=0.49) == {1, 2, 3}
    even = np.zeros(3, np.float32)
    assert {choose(even, 1.0, 0, 1.0, 1.0, random) for random in [0, LAST, *draws(50)]} == {0, 1, 2}


def test_adjusted_logits():
    """Against float64: each of the float32 operations rounds once. What is not named keeps its bits."""
    logits, ids = normal(1000, 4) * np.float32(20), np.array([999, 3, 500, 7, 8, 0])
    logits[8] = 0
    counts = np.array([0, 1, 2, 0, 5, 1])
    for repetition, frequency, presence in [(1.3, 0, 0), (0.7, 0, 0), (1.0, 0.37, 0), (1.0, 0, -1.3), (1.15, -0.2, 0.9)]:
        found = logits.copy()
        adjust(found, ids, counts, repetition, frequency, presence)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            factor, value = np.float32(repetition), float(logits[token])
            value = np.float32(value / float(factor) if value > 0 else value * float(factor))
            product = np.float32(float(np.float32(frequency)) * count)
            value = np.float32(float(value) - float(product))
            value = np.float32(float(value) - float(np.float32(presence))) if count else value
            assert found[token] == value, (token, repetition, frequency, presence)
            expected = float(logits[token]) * (1 / repetition if logits[token] > 0 else repetition) - frequency * count
            assert found[token] == pytest.approx(expected - presence * (count > 0), rel=1e-6, abs=1e-6)
        others = np.setdiff1d(np.arange(1000), ids)
        assert_same(found[others], logits[others])


def test_top_p_keeps_the_shortest_prefix():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25])).astype(np.float32)
    def reached(**settings):
        values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
        return {choose(logits, random=random, **values) for random in [0, LAST, *draws(200)]}
    assert reached() == {0, 1, 2, 3}
    assert reached(top_p=0.49) == {1} and reached(top_p=0.51) == {1, 3} and reached(top_p=0.76) == {1, 3, 2}
    assert reached(top_k=2) == {1, 3} and reached(top_k=2, top_p=0.6) == {1}        # 0.5 of 0.75 is two thirds


def test_top_p_at_the_exact_share():
    """Exactly half the weight is enough for 0.5; the largest of weights 2**32 and 3 just misses 1 - 2**-31."""
    even = np.zeros(4, np.float32)
    assert {choose(even, 1.0, 0, 0.5, 0.0, random) for random in [0, LAST, *draws(50)]} == {0, 1}
    uneven = np.log([1, 3 / 2**32]).astype(np.float32)
    assert weights_of(uneven)[2].tolist() == [2**32, 3]
    assert choose(uneven, 1.0, 0, 1 - 2.0**-31, 0.0, LAST) == 1
    assert choose(uneven, 1.0, 0, 1 - 2.0**-30, 0.0, LAST) == 0


def chi_square(counts, probabilities):
    expected = np.asarray(probabilities) * sum(counts)
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("settings, kept", [({}, 10), ({"temperature": 0.7}, 10), ({"top_p": 0.8}, None),
                                            ({"temperature": 1.6, "top_k": 5}, 5)])
def test_distribution(settings, kept):
    """10,000 draws against softmax in float64; 29.6 is exceeded once in 2,000 times with nine degrees of freedom."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    logits = normal(10, 8)
    p = np.exp(logits.astype(np.float64) / values["temperature"])
    order = np.argsort(-p)
    if kept is None:
        kept = int(np.searchsorted(np.cumsum(p[order]) / p.sum(), values["top_p"])) + 1
        assert 2 < kept < 9
    p[order[kept:]] = 0
    tokens = [choose(logits, random=random, weigh=cpu_weigh, **values) for random in draws(10000)]
    counts = np.bincount(tokens, minlength=10)
    assert not counts[p == 0].any()
    assert chi_square(counts[p > 0], p[p > 0] / p.sum()) < 29.6


EXTREME_LOGITS = np.array([-(2.0**20) + 1, 3, 1e-30, 7.25, 7.25 - 2**-21, 0, 7.25, -7], np.float32)


@WEIGHTS
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-20, 1e-12])
def test_low_temperatures_take_the_largest(temperature, weigh):
    """The two largest are equal, so both are drawn; their neighbour, one unit in the last place below, never is."""
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        def reached(logits=EXTREME_LOGITS, top_k=0, top_p=1.0):
            return {choose(logits, temperature, top_k, top_p, 0.0, random, weigh) for random in [0, LAST, *draws(50)]}
        assert reached() == reached(top_k=3) == reached(top_p=0.9) == {3, 6}
        assert reached(top_k=1) == reached(top_p=0.1) == {3}
        assert reached(np.delete(EXTREME_LOGITS, 6)) == {3}
        assert reached(np.array([0, 2.0**-32], np.float32)) == {1}


@WEIGHTS
@pytest.mark.parametrize("temperature", [1e12, 1e30, 1e38, 1e39, 1e300, 1.7976931348623157e308])
def test_high_temperatures_draw_evenly_in_the_order_of_the_logits(temperature, weigh):
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        counts = np.bincount([choose(EXTREME_LOGITS, temperature, 0, 1.0, 0.0, random, weigh) for random in draws(2000)])
        assert chi_square(counts, np.full(8, 1 / 8)) < 26.1
        assert {choose(EXTREME_LOGITS, temperature, 1, 1.0, 0.0, random, weigh) for random in [0, LAST]} == {3}
        assert {choose(EXTREME_LOGITS, temperature, 3, 1.0, 0.0, random, weigh) for random in [0, *draws(50)]} == {3, 6, 4}


def test_temperature_zero_takes_the_first_of_the_largest():
    assert choose(EXTREME_LOGITS, 0.0, 5, 0.5, 0.0, LAST) == 3


def test_dividing_does_not_change_the_order():
    """Neighbours that a division makes equal keep their order: top_k = 1 is the largest at every temperature."""
    logits = np.array([1.9, np.nextafter(np.float32(1.9), np.float32(2))], np.float32)
    temperature = 0.9
    assert logits[0] / np.float32(temperature) == logits[1] / np.float32(temperature)
    assert choose(logits, temperature, 1, 1.0, 0.0, 0) == 1


@WEIGHTS
def test_log_probabilities(weigh):
    for size, seed, spread in [(1, 0, 1), (300, 1, 3), (49152, 2, 5), (1000, 3, 1e5)]:
        logits, scratch = normal(size, seed) * np.float32(spread), np.empty(size, np.int64)
        exact = logits.astype(np.float64)
        truth = exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
        for token in {0, size // 2, size - 1, int(logits.argmax())}:
            value = chosen_logprob(logits, token, scratch, weigh)
            assert value.dtype == np.float32 and (value < 0 or not np.signbit(value))
            assert value == pytest.approx(truth[token], rel=1e-7, abs=1e-6)


def test_a_certain_token_has_log_probability_zero():
    value = log_probability(5.0, 5.0, 1 << 32)
    assert value == 0 and not np.signbit(value)
