"""Attention on a device gives the bits of the plain rule, over pages, windows, blocks and shares of heads."""

import numpy as np
import pytest
from kv_pools import KINDS, Pools, queries

from llama_hpc.kernels import reference
from llama_hpc.kernels.cuda.attention import Scratch
from llama_hpc.kernels.numerics import OK, OUT_OF_RANGE

# Sequence and position of each row: first and last of pages and blocks, single rows and runs.
SEQUENCES = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
POSITIONS = [0, 15, 16, 255, 256, 257, 300, 511, 512, 513, 599]
LENGTHS = 1, 17, 258, 600


def assert_same_bits(pools, device, q, sequences, positions, heads, window=0, **how):
    status, expected = pools.expected(q, sequences, positions, heads, window)
    assert status == OK
    status, target = pools.attend(device, q, sequences, positions, heads, window, **how)
    assert status == OK
    assert device.download(target.values)[: len(q)].tobytes() == expected.tobytes()
    return target, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim,heads,window", [(8, (1, 1), 0), (48, (3, 1), 300), (64, (4, 4), 0), (128, (0, 5), 17)])
def test_bits_of_the_reference(device, kind, head_dim, heads, window):
    q = queries(len(POSITIONS), sum(heads) * head_dim)
    assert_same_bits(Pools(LENGTHS, 2, head_dim, kind), device, q, SEQUENCES, POSITIONS, heads, window)


# A run of 13 rows into the next block between single rows of other sequences, and a short run.
MIXED = [1, *[3] * 13, 2, 2, 2, 0], [16, *range(248, 261), 0, 1, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim,heads,window", [(8, (16, 5), 0), (20, (8, 0), 0), (48, (7, 8), 150), (64, (8, 3), 0),
                                                   (80, (8,), 5), (128, (8, 1), 0), (144, (8,), 300)])
def test_tiles_of_rows(device, kind, head_dim, heads, window):
    q = queries(len(MIXED[0]), sum(heads) * head_dim)
    assert_same_bits(Pools(LENGTHS, len(heads), head_dim, kind), device, q, *MIXED, heads, window)


def test_tiles_of_rows_where_each_has_one_head(device):
    assert_same_bits(Pools([600], 2, 16, np.uint16), device, queries(100, 32), [0] * 100, np.arange(500, 600), (1, 1), chunk=70)


def test_a_plan(device):
    """Runs of 3 (whose rows do not follow), 300 and 2 rows, in tiles of 8, of which 4 rows are worth one."""
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


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_rows_of_one_sequence(device, rows):
    """More rows than the scratch holds at a time; a tile of heads with room to spare."""
    pools, positions = Pools([300], 3, 16, np.uint16), np.arange(rows) + 250
    assert_same_bits(pools, device, queries(rows, 96), [0] * rows, positions, (0, 4, 2), chunk=10)


def test_many_heads_of_one_kv_head(device):
    assert_same_bits(Pools([280], 1, 8, np.uint16), device, queries(2, 21 * 8), [0, 0], [30, 279], (21,))


@pytest.mark.parametrize("window", [1, 2, 16, 256, 257, 258])
def test_windows(device, window):
    pools = Pools(LENGTHS, 1, 8, np.uint16)
    assert_same_bits(pools, device, queries(len(POSITIONS), 8), SEQUENCES, POSITIONS, (1,), window)


def test_scores_far_apart(device):
    """Whole blocks whose weights vanish, and one position that takes everything."""
    assert_same_bits(Pools([600], 1, 64, np.uint16), device, queries(3, 128) * np.float32(20), [0] * 3, [255, 256, 599], (2,))


@pytest.mark.parametrize("head_dim", [20, 64])
def test_outputs_are_quantised_head_by_head(device, head_dim):
    pools, q = Pools([40], 2, head_dim, np.uint16), queries(3, 3 * head_dim)
    target, expected = assert_same_bits(pools, device, q, [0] * 3, [5, 6, 39], (1, 2), quantized=True)
    _, values, scales = reference.quantize_rows(expected, head_dim)
    assert np.array_equal(device.download(target.x)[:3], values)
    assert device.download(target.scales)[:3].tobytes() == scales.tobytes()


@pytest.mark.parametrize("bad", [2.0**19, -1e6, np.inf, np.nan])
def test_values_out_of_range_are_told(device, bad):
    pools = Pools([300], 2, 16, np.float32)
    k, v = np.ones((1, 2, 16), np.float32), np.ones((1, 2, 16), np.float32)
    v[0, 1, 3] = bad
    pools.write(0, 299, k, v)
    q = queries(4, 32)
    assert pools.attend(device, q[:3], [0] * 3, [5, 256, 298], (1, 1))[0] == OK
    assert pools.attend(device, q, [0] * 4, [5, 297, 298, 299], (1, 1), 1, quantized=True)[0] == OUT_OF_RANGE


@pytest.mark.parametrize("position", [0, 100, 256, 299])
def test_nan_in_keys_or_queries_is_told(device, position):
    pools = Pools([300], 2, 16, np.float32)
    k, v = np.ones((1, 2, 16), np.float32), np.ones((1, 2, 16), np.float32)
    k[0, 1, 3] = np.nan
    pools.write(0, position, k, v)
    q = queries(1, 32)
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
