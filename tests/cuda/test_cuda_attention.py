"""Attention on a device gives the bits of the plain rule, over pages, windows, blocks and shares of heads."""

from functools import cache

import numpy as np
import pytest
from kv_pools import KINDS, Pools, queries

from llama_hpc.kernels import attention_inputs as inputs
from llama_hpc.kernels import reference
from llama_hpc.kernels.cuda.attention import Scratch
from llama_hpc.kernels.cuda.attention_call import attention
from llama_hpc.kernels.numerics import OK, OUT_OF_RANGE

LENGTHS = 1, 17, 258, 600
# Sequence and position of each row. First and last of pages and blocks, single rows and short runs:
SINGLE = (0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3), (0, 15, 16, 255, 256, 257, 300, 511, 512, 513, 599)
# a run of 13 rows into the next block between single rows of other sequences, and a short run.
MIXED = (1, *[3] * 13, 2, 2, 2, 0), (16, *range(248, 261), 0, 1, 2, 0)


def run(first, rows):
    return (0,) * rows, tuple(range(first, first + rows))


@cache
def case(lengths, head_dim, kind, rows, heads, window, size):
    """Pools, queries, and what the reference makes of them."""
    pools, q = Pools(lengths, len(heads), head_dim, kind), queries(len(rows[0]), sum(heads) * head_dim) * np.float32(size)
    status, expected = pools.expected(q, *rows, heads, window)
    assert status == OK
    return pools, q, expected


def assert_same_bits(device, rows, heads, head_dim, kind=np.uint16, lengths=(300,), window=0, size=1, **how):
    pools, q, expected = case(lengths, head_dim, kind, rows, heads, window, size)
    status, target = pools.attend(device, q, *rows, heads, window, **how)
    assert status == OK
    assert device.download(target.values)[: len(q)].tobytes() == expected.tobytes()
    return target, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim,heads,window", [(8, (1, 1), 0), (48, (3, 1), 300), (64, (4, 4), 0), (128, (0, 5), 17)])
def test_single_rows(device, kind, head_dim, heads, window):
    assert_same_bits(device, SINGLE, heads, head_dim, kind, LENGTHS, window)


@pytest.mark.parametrize("kind,head_dim,heads,window", [
    *((kind, *shape) for kind in KINDS for shape in ((64, (8,), 0), (128, (8, 1), 0))),
    (np.float32, 20, (16, 0), 0), (np.int8, 48, (7, 8), 150), (np.uint16, 144, (8,), 300)])
def test_tiles_of_rows(device, kind, head_dim, heads, window):
    assert_same_bits(device, MIXED, heads, head_dim, kind, LENGTHS, window)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_more_rows_than_the_scratch_holds(device, rows):
    assert_same_bits(device, run(250, rows), (0, 4, 2), 16, chunk=10)


def test_a_tile_of_rows_that_have_one_head(device):
    assert_same_bits(device, run(230, 70), (1,), 8)


def test_many_heads_of_one_kv_head(device):
    assert_same_bits(device, ((0, 0), (30, 279)), (21,), 8)


@pytest.mark.parametrize("window", [1, 16, 256, 257])
def test_windows(device, window):
    assert_same_bits(device, SINGLE, (1,), 8, np.uint16, LENGTHS, window)


def test_a_window_shorter_than_a_tile(device):
    assert_same_bits(device, run(246, 20), (16,), 8, window=2)


def test_scores_far_apart(device):
    """Whole blocks whose weights vanish, and one position that takes everything."""
    assert_same_bits(device, ((0, 0, 0), (255, 256, 599)), (2,), 64, lengths=(600,), size=20)


@pytest.mark.parametrize("head_dim", [20, 64])
def test_outputs_are_quantised_head_by_head(device, head_dim):
    target, expected = assert_same_bits(device, ((0, 0, 0), (5, 6, 39)), (1, 2), head_dim, quantized=True)
    _, values, scales = reference.quantize_rows(expected, head_dim)
    assert np.array_equal(device.download(target.x)[:3], values)
    assert device.download(target.scales)[:3].tobytes() == scales.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,head_dim,heads", [(1, 128, (4, 4)), (17, 128, (8, 8)), (257, 128, (4, 4)), (257, 64, (3, 1)),
                                                 (65, 80, (1, 1)), (33, 256, (16,))])
def test_long_sequences(gpu, kind, rows, head_dim, heads):
    """The reference takes some of the rows only."""
    pools, q = Pools([8192], len(heads), head_dim, kind), queries(rows, sum(heads) * head_dim)
    sequences, positions = run(8192 - rows, rows)
    status, target = pools.attend(gpu, q, sequences, positions, heads)
    assert status == OK
    for row in {0, rows // 2, rows - 1}:
        expected = pools.expected(q[row : row + 1], [0], [positions[row]], heads)[1]
        assert gpu.download(target.values)[row].tobytes() == expected.tobytes()


def test_a_plan(device):
    """Runs of 1, 1, 1, 300 and 2 rows, in tiles of 8, of which 4 rows are worth one."""
    sequences, positions = [0, 0, 1, *[2] * 300, 3, 3], [5, 7, 8, *range(250, 550), 0, 1]
    integers = [device.upload(np.array(x, np.int32)) for x in (sequences, positions, [305])]
    scratch = Scratch(device, 320, 3, 1, 16)
    plan = scratch.tiles, scratch.items, scratch.alone, scratch.counts
    device.launch("attention_plan.cu", "plan_tiles", (1,), (256,), *integers, 0, 320, 0, 2, 8, 4, *plan)
    tiles, items, alone, counts = map(device.download, plan)
    starts = [0, 1, 2, *range(3, 303, 8), 303, 305]
    blocks = [0, 0, 0, *((min(p + 7, 549) // 256 + 1) for p in range(250, 550, 8)), 0]
    assert counts.tolist() == [len(starts) - 1, 2 * sum(blocks), 5]
    assert tiles[: len(starts)].tolist() == starts
    assert items[: len(starts)].tolist() == [0, *np.cumsum(blocks) * 2]
    assert sorted(alone[:5]) == [0, 1, 2, 303, 304]


def test_a_step_is_replayed_with_other_rows(device):
    """Captured once, then run again with what is on the device by then: tiles, single rows, fewer rows."""
    pools, heads = Pools(LENGTHS, 1, 16, np.uint16), (8,)
    q, target, again = pools.attend(device, queries(18, 128), *MIXED, heads, record=True)[1:]
    for count, (sequences, positions) in ((18, MIXED), (11, SINGLE), (5, ((3,) * 5, range(254, 259)))):
        expected = pools.expected(q[:count], sequences, positions, heads)[1]
        assert again(count, sequences, positions) == OK
        assert device.download(target.values)[:count].tobytes() == expected.tobytes()


@pytest.mark.parametrize("shared_bytes", [99 << 10, 64 << 10])
def test_less_shared_memory(device, monkeypatch, shared_bytes):
    """As of sm_86 and sm_75: tiles have one stage, or there are none; fewer heads are taken together."""
    monkeypatch.setattr(device, "shared_bytes", shared_bytes)
    assert_same_bits(device, MIXED, (8,), 144, np.uint16, LENGTHS, 300)


def ruined(where, bad, position):
    """Pools of ones of which one number, of the second KV head, is ``bad``."""
    pools, both = Pools([300], 2, 16, np.float32), {"k": np.ones((1, 2, 16), np.float32), "v": np.ones((1, 2, 16), np.float32)}
    both[where][0, 1, 3] = bad
    pools.write(0, position, **both)
    return pools


@pytest.mark.parametrize("bad", [2.0**19, np.inf, np.nan])
def test_values_out_of_range_are_told(device, bad):
    pools, q = ruined("v", bad, 299), queries(4, 32)
    assert pools.attend(device, q[:3], [0] * 3, [5, 256, 298], (1, 1))[0] == OK
    assert pools.attend(device, q, [0] * 4, [5, 297, 298, 299], (1, 1), 1, quantized=True)[0] == OUT_OF_RANGE
    q = queries(4, 512)
    assert pools.attend(device, q[:3], *run(296, 3), (0, 32), 1)[0] == OK
    assert pools.attend(device, q, *run(296, 4), (0, 32), 1)[0] == OUT_OF_RANGE


@pytest.mark.parametrize("position", [0, 100, 256, 299])
def test_nan_in_keys_or_queries_is_told(device, position):
    pools, q = ruined("k", np.nan, position), queries(1, 32)
    assert pools.attend(device, q, [0], [299], (2, 0))[0] == OK
    assert pools.attend(device, q, [0], [299], (1, 1))[0] == OUT_OF_RANGE
    for broken in (np.nan, np.inf):
        q[0, 3] = broken
        assert pools.attend(device, q, [0], [299], (2, 0))[0] == OUT_OF_RANGE


def test_what_does_not_fit_is_told(device):
    pools, q = Pools([300], 1, 16, np.float32), queries(1, 16)
    with pytest.raises(ValueError, match="even number of up to 256"):
        Scratch(device, 1, 1, 1, 258)
    with pytest.raises(ValueError, match="1 blocks of heads of 16 is too small for 2"):
        pools.attend(device, q, [0], [299], (1,), blocks=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("causal,window,scale", [(True, 0, None), (True, 20, 0.5), (False, 0, None)])
def test_called_on_its_own(device, dtype, causal, window, scale):
    q, k, v = queries(5, 32).reshape(5, 4, 8), *(queries(270, 16, seed).reshape(270, 2, 8).astype(dtype) for seed in (1, 2))
    pools, out = [x.view(np.uint16) if dtype == np.float16 else x for x in inputs.in_pages(k, v)], np.empty((5, 32), np.float32)
    status = reference.attention(q.reshape(5, 32), *pools, np.arange(17)[None], [0] * 5,
                                 inputs.positions_of(q, k, causal), np.repeat([0, 1], 2), window, scale or 8**-0.5, out, None, 5)
    assert status == OK
    assert attention(q, k, v, causal, window, scale, device=device).tobytes() == out.tobytes()


def test_bad_calls(device):
    q = np.ones((2, 2, 8), np.float32)
    with pytest.raises(ValueError, match="rows are the last positions"):
        attention(q, q[:1], q[:1], device=device)
    with pytest.raises(FloatingPointError, match="beyond the range"):
        attention(q, q, q * np.nan, device=device)
    assert attention(q[:0], q, q, device=device).shape == (0, 2, 8)
