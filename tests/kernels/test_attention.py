"""Attention: bits of the plain rule over pages, windows and blocks; cuts that change nothing; accuracy and range."""

import numpy as np
import pytest
from kernel_inputs import assert_same
from kv_caches import DTYPES, Cache, operate, queries

from llama_hpc.kernels.cpu import attention, elementwise
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.numerics import OK, OUT_OF_RANGE

KV_OF_HEAD = 0, 0, 1, 1, 1
# Sequence and position of each row: first and last of pages and blocks, one query at a time and runs of several.
SEQUENCES = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
POSITIONS = [0, 15, 16, 255, 256, 257, 300, 511, 512, 513, 514, 515, 699]
LENGTHS = 1, 17, 258, 700


def softmax_attention(q, keys, values, scale):
    """float64 attention [head_dim] of one query over keys and values [n, head_dim]."""
    scores = keys.astype(np.float64) @ q.astype(np.float64) * float(scale)
    weights = np.exp(scores - scores.max())
    return weights @ values.astype(np.float64) / weights.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 12, 48, 64, 80])
@pytest.mark.parametrize("window", [0, 1, 300])
def test_bits_of_the_reference_and_float64(head_dim, dtype, window):
    cache = Cache(LENGTHS, 2, head_dim, dtype).write()
    q = queries(len(POSITIONS), head_dim)
    arguments = q, SEQUENCES, POSITIONS, KV_OF_HEAD, window
    status, expected = cache.expected(*arguments)
    assert status == OK
    for threads, single in ((1, False), (1, True), (2, False), (3, True)):
        status, out = cache.attend(*arguments, threads=threads, single=single)
        assert status == OK
        assert_same(out, expected)
    for row, (s, position) in enumerate(zip(SEQUENCES, POSITIONS, strict=True)):
        visible = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for head, kv in enumerate(KV_OF_HEAD):
            part = slice(head * head_dim, (head + 1) * head_dim)
            keys, values = cache.keys[s][visible, kv], cache.values[s][visible, kv]
            truth = softmax_attention(q[row, part], keys, values, head_dim**-0.5)
            np.testing.assert_allclose(out[row, part], truth, rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads, head_dim", [([9], 16), ([1, 1], 128), ([2, 1], 256), ([4], 112), ([0, 3, 0, 2], 32),
                                             ([8, 8], 16)])
def test_shapes(heads, head_dim):
    """Any number of query heads to a KV head, as shares of a tensor axis have them: none for some."""
    cache = Cache([290], len(heads), head_dim, np.uint16).write()
    kv_of_head = np.repeat(np.arange(len(heads)), heads)
    q, positions = queries(7, head_dim, heads=sum(heads)), [3, 4, 5, 6, 255, 256, 289]
    arguments = q, [0] * 7, positions, kv_of_head
    status, out = cache.attend(*arguments, threads=2)
    assert status == OK
    assert_same(out, cache.expected(*arguments)[1])


@pytest.mark.parametrize("window", [2, 3, 4, 15, 16, 17, 100, 256, 257, 513])
def test_windows(window):
    cache = Cache(LENGTHS, 2, 8, np.uint16).write()
    q = queries(len(POSITIONS), 8)
    arguments = q, SEQUENCES, POSITIONS, KV_OF_HEAD, window
    _, out = cache.attend(*arguments)
    assert_same(out, cache.expected(*arguments)[1])
    assert_same(cache.attend(*arguments, single=True)[1], out)
    inside = np.array(POSITIONS) < window
    assert_same(out[inside], cache.attend(*arguments[:-1])[1][inside])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_one_returns_the_value(dtype):
    cache = Cache([300], 2, 20, dtype)
    cache.values[0] = cache.rounded(np.rint(cache.values[0] * 1024) / 1024)
    cache.write()
    status, out = cache.attend(queries(3, 20, heads=2), [0, 0, 0], [0, 17, 299], (0, 1), window=1)
    assert status == OK
    np.testing.assert_array_equal(out.reshape(3, 2, 20), cache.values[0][[0, 17, 299]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 130])
def test_chunks_of_a_prompt_change_nothing(dtype, window):
    """Keys are written chunk by chunk, later slots still hold NaN; decoding is a chunk of one."""
    length, head_dim = 530, 16
    q = queries(length, head_dim)
    def prefill(chunk):
        cache, out = Cache([20, length], 2, head_dim, dtype), np.empty_like(q)
        for first in range(0, length, chunk):
            positions = np.arange(first, min(first + chunk, length))
            cache.write(sequences=[1], start=first, stop=first + chunk)
            status, out[positions] = cache.attend(q[positions], [1] * len(positions), positions, KV_OF_HEAD, window)
            assert status == OK
        return out
    whole = prefill(length)
    assert np.isfinite(whole).all()
    for chunk in (1, 7, 256):
        assert_same(prefill(chunk), whole)


def test_runs_are_consecutive_positions_of_a_sequence():
    runs = np.zeros((len(POSITIONS), 2), np.int32)
    count = attention.runs_of(np.array(SEQUENCES), np.array(POSITIONS), len(POSITIONS), runs)
    assert runs[:count].tolist() == [[0, 1], [1, 2], [3, 3], [6, 1], [7, 4], [11, 1], [12, 1]]
    assert attention.runs_of(np.array([0, 0, 1, 1]), np.array([5, 6, 7, 7]), 3, runs) == 2
    assert runs[:2].tolist() == [[0, 2], [2, 1]]


def test_neither_pages_nor_company_nor_heads_change_anything():
    q = queries(3, 16)
    rows = [1, 1, 1], [520, 3, 256]
    _, expected = Cache([20, 530], 2, 16, np.uint16).write().attend(q, *rows, KV_OF_HEAD)
    cache = Cache([20, 530], 2, 16, np.uint16).write()
    cache.pages[1] = cache.pages[1][::-1].copy()                # the same contents in other pages
    cache.write()
    assert_same(cache.attend(q, *rows, KV_OF_HEAD)[1], expected)
    mixed = np.concatenate([queries(2, 16, seed=9), q[::-1]])
    assert_same(cache.attend(mixed, [0, 0, 1, 1, 1], [7, 19, 256, 3, 520], KV_OF_HEAD)[1][:1:-1], expected)
    for heads in ([1, 2, 3], [4], [0, 1]):                      # what a tensor rank may hold
        part = np.ascontiguousarray(q.reshape(3, 5, 16)[:, heads]).reshape(3, -1)
        _, out = cache.attend(part, *rows, [KV_OF_HEAD[h] for h in heads], threads=2)
        assert_same(out.reshape(3, -1, 16), expected.reshape(3, 5, 16)[:, heads])


def test_scores_far_apart():
    """Whole blocks whose weights vanish, and one position that takes everything."""
    cache = Cache([700], 2, 16, np.uint16, size=30.0).write()
    q = queries(4, 16, heads=2) * np.float32(20)
    arguments = q, [0] * 4, [255, 256, 600, 699], (0, 1)
    status, out = cache.attend(*arguments)
    assert status == OK
    assert_same(out, cache.expected(*arguments)[1])
    for row, position in enumerate(arguments[2]):
        for head in range(2):
            keys, values = cache.keys[0][: position + 1, head], cache.values[0][: position + 1, head]
            truth = softmax_attention(q[row, head * 16 : (head + 1) * 16], keys, values, 0.25)
            np.testing.assert_allclose(out[row, head * 16 : (head + 1) * 16], truth, atol=1e-3)


@pytest.mark.parametrize("head_dim", [20, 64])
def test_outputs_are_quantised_head_by_head(head_dim):
    cache = Cache([40], 2, head_dim, np.uint16).write()
    arguments = queries(3, head_dim), [0] * 3, [5, 6, 39], KV_OF_HEAD
    ours, theirs = (Activation(4, 5 * head_dim, head_dim, True) for _ in range(2))
    ours.values = ours.values[:3]
    assert cache.attend(*arguments, threads=2, target=ours)[0] == OK
    theirs.values[:3] = cache.expected(*arguments)[1]
    operate(1, elementwise.quantize_operation, elementwise.NORM, rows=np.array([3]), target=theirs.record)
    for name in ("values", "x", "scales", "corrections"):
        assert_same(getattr(ours, name)[:3], getattr(theirs, name)[:3])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [2.0**19, -1e6, np.inf, np.nan])
def test_values_out_of_range_are_reported(bad, threads):
    cache = Cache([300], 2, 16, np.float32)
    cache.values[0][299, 1, 3] = bad
    cache.write()
    q = queries(4, 16, heads=2)
    for attend in (lambda *a: cache.attend(*a, threads=threads), cache.expected):
        assert attend(q[:3], [0] * 3, [5, 256, 298], (0, 1))[0] == OK
        assert attend(q, [0] * 4, [5, 297, 298, 299], (0, 1), 1)[0] == OUT_OF_RANGE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("position", [0, 100, 256, 299])
def test_nan_in_keys_or_queries_is_reported(position, threads):
    cache = Cache([300], 2, 16, np.float32)
    cache.keys[0][position, 1, 3] = np.nan
    cache.write()
    q = queries(1, 16, heads=2)
    for attend in (lambda *a: cache.attend(*a, threads=threads), cache.expected):
        assert attend(q, [0], [299], (0, 0))[0] == OK
        assert attend(q, [0], [299], (0, 1))[0] == OUT_OF_RANGE
        for bad in (np.nan, np.inf):
            broken = q.copy()
            broken[0, 3] = bad
            assert attend(broken, [0], [299], (0, 0))[0] == OUT_OF_RANGE
