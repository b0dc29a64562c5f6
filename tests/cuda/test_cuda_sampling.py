"""The largest logits and the sums of weights on a device, by segments of the vocabulary."""

import numpy as np
import pytest

from llama_hpc.kernels.cuda.sampling import find_best, find_totals, pick
from llama_hpc.kernels.sampling import NOTHING, SEGMENT, logit_of, token_of, weigh

SIZES = 1, 7, 512, 4097, 32000


def rows_of_logits(size, seed=0):
    """Logits as models have them, with ties, with -inf, far apart, all the same, and of both zeros."""
    rng = np.random.default_rng((seed, size))
    rows = rng.standard_normal((6, size), np.float32) * np.float32(4)
    rows[1] = np.rint(rows[1])
    rows[2, 1::3] = -np.inf
    rows[3] *= np.float32(1e4)
    rows[4] = np.float32(1.25)
    rows[5] = np.where(rows[5] < 3, np.float32(-0.0), np.float32(0)) if size > 1 else np.float32(-0.0)
    return rows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [0, 5000])
def test_best_and_totals(device, size, first):
    logits = rows_of_logits(size)
    count, segments = len(logits), -(-size // SEGMENT) + 1
    best, totals = (device.zeros((count + 1, segments), np.int64) for _ in range(2))
    rows, on_device = device.upload(np.array([count], np.int32)), device.upload(logits)
    find_best(device, on_device, first, rows, count + 1, best)
    find_totals(device, on_device, best, rows, count + 1, totals)
    best, totals = device.download(best), device.download(totals)
    assert not best[count].any() and not totals[count].any() and (best[:count, -1] == NOTHING).all()
    for row in range(count):
        weights = np.empty(size, np.int64)
        maximum, total = weigh(logits[row], weights)
        assert int(totals[row].sum()) == total and logit_of(best[row].max(keepdims=True)) == maximum
        for segment in range(segments - 1):
            part = slice(segment * SEGMENT, (segment + 1) * SEGMENT)
            assert token_of(best[row, segment]) == first + part.start + logits[row, part].argmax()
            assert totals[row, segment] == weights[part].sum()


def test_totals_are_relative_to_what_other_ranks_found(device):
    """The vocabulary of two ranks, whose keys are joined before the sums."""
    logits, weights = rows_of_logits(5000)[:1], np.empty(5000, np.int64)
    rows, joined, sums = device.upload(np.array([1], np.int32)), NOTHING, 0
    parts = [(0, device.upload(logits[:, :100].copy())), (100, device.upload(logits[:, 100:].copy()))]
    keys, totals = (device.zeros((1, 2), np.int64) for _ in range(2))
    for first, part in parts:
        find_best(device, part, first, rows, 1, keys)
        joined = np.maximum(joined, device.download(keys))
    device.upload(joined, keys)
    for _, part in parts:
        find_totals(device, part, keys, rows, 1, totals)
        sums = sums + device.download(totals)
    assert (int(sums.sum()), joined.max() & 0x7FFFFFFF) == (weigh(logits[0], weights)[1], 0x7FFFFFFF - logits.argmax())


def test_logits_of_tokens(device):
    """Of the tokens of this rank; those of others are 0. No more than there are rows, on the device, and than are asked for."""
    logits, first = rows_of_logits(300), 1000
    tokens = np.array([1000, 1299, 999, 1300, 1007, 1001], np.int32)
    for count, most in ((6, 6), (6, 2), (4, 6)):
        picked, rows = device.zeros((6,), np.float32), device.upload(np.array([count], np.int32))
        pick(device, device.upload(logits), first, device.upload(tokens), rows, most, picked)
        expected = np.array([logits[0, 0], logits[1, 299], 0, 0, logits[4, 7], logits[5, 1]], np.float32)
        expected[min(count, most) :] = 0
        assert device.download(picked).tobytes() == expected.tobytes()
