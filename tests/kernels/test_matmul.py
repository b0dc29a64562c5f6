"""Products: bits of the plain rule for every shape, cuts and threads that change nothing, accuracy, range."""

from itertools import pairwise

import numpy as np
import pytest
from kernel_inputs import (
    assert_same,
    float_weights,
    integer_weights,
    normal,
    product,
    random_activations,
    random_integers,
)

from llama_hpc.kernels import reference
from llama_hpc.kernels.cpu import elementwise, matmul
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import OK, OUT_OF_RANGE

KINDS = "float", "integer"
SHAPES = [(35, 8, 8), (16, 12, 256), (17, 48, 48), (33, 172, 32), (1, 172, 64), (15, 288, 256), (40, 576, 48),
          (48, 576, 256)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k, block", SHAPES)
def test_bits_of_the_reference(n, k, block, kind):
    x, scales, weights, sums = product(kind, n, k, block, tokens=17)
    expected = np.empty_like(sums)
    assert reference.matmul(x, scales, weights, expected, 17) == OK
    for tokens in range(1, 18):
        for threads in (1, 2):
            sums[:] = -1
            assert matmul.matmul(x, scales, weights, sums, tokens, threads) == OK
            assert_same(sums[:tokens], expected[:tokens])
            assert (sums[tokens:] == -1).all()
    assert not sums[:, n:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k, block", SHAPES)
def test_close_to_the_product_in_float64(n, k, block, kind):
    """A chain of m terms errs by at most m roundings of the sum of magnitudes; a block, once by the fixed point."""
    blocks = Blocks(k, block)
    if kind == "float":
        w, x = normal((n, k)), normal((9, k), 1)
        weights, operand, scales = float_weights(w, block), x, np.zeros((1, 1), np.float32)
    else:
        values, factors, row_scales = random_integers(n, blocks)
        w = blocks.unpad(values * (factors.astype(np.float64) * row_scales[:, None])[:, :, None])
        operand, scales = random_activations(9, blocks)
        x = blocks.unpad(operand.reshape(9, -1, 32) * scales.astype(np.float64)[:, :, None])
        weights = integer_weights(values, factors, row_scales, blocks.groups_per_block)
    sums, out = np.empty((9, matmul.tiles(n) * 16), np.int64), np.empty((9, n), np.float32)
    assert matmul.matmul(operand, scales, weights, sums, 9) == OK
    assert elementwise.finish(sums, np.zeros(0, np.float32), out, 9) == OK
    x, w = x.astype(np.float64), w.astype(np.float64)
    terms = (block if kind == "float" else blocks.groups_per_block) + 4
    bound = terms * 2.0**-24 * (np.abs(x) @ np.abs(w).T) + blocks.n_blocks * 2.0**-33
    assert (np.abs(out - x @ w.T) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_columns_or_rows(kind):
    x, scales, weights, sums = product(kind, 20, 0, 32, tokens=9)
    for threads in (1, 2):
        sums[:] = -1
        assert matmul.matmul(x, scales, weights, sums, 9, threads) == OK
        assert not sums.any()
    x, scales, weights, sums = product(kind, 0, 64, 32, tokens=9)
    assert matmul.matmul(x, scales, weights, sums, 9) == matmul.matmul(x, scales, weights, sums, 9, 2) == OK
    assert reference.matmul(x, scales, weights, sums, 9) == OK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k, block, cuts", [(576, 64, [0, 3, 3, 4, 9]), (172, 32, [0, 1, 5, 6]), (384, 48, [0, 5, 8])])
def test_columns_cut_at_blocks_add_up(k, block, cuts, kind):
    """Shards of a row-parallel layer, one of them possibly empty."""
    n, tokens, blocks = 35, 9, Blocks(k, block)
    x, scales, whole, expected = product(kind, n, k, block, tokens)
    matmul.matmul(x, scales, whole, expected, tokens)
    total = np.zeros_like(expected)
    w, parts = normal((n, k), 0, 0.1), random_integers(n, blocks)
    for first, last in pairwise(cuts):
        if kind == "float":
            k_range = slice(first * block, last * block)
            shard, part, part_scales = float_weights(w[:, k_range], block), x[:, k_range], scales
        else:
            groups = slice(first * blocks.groups_per_block, last * blocks.groups_per_block)
            values, factors, row_scales = parts
            shard = integer_weights(values[:, groups], factors[:, groups], row_scales, blocks.groups_per_block)
            part = x.reshape(tokens, -1, 32)[:, groups].reshape(tokens, -1)
            part_scales = scales[:, groups]
        sums = np.empty_like(expected)
        part, part_scales = np.ascontiguousarray(part), np.ascontiguousarray(part_scales)
        assert matmul.matmul(part, part_scales, shard, sums, tokens) == OK
        total += sums
    assert_same(total, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_shard_equal_those_of_the_whole(kind):
    """Shards of a column-parallel layer, cut anywhere, filled in several parts."""
    n, k, block, tokens = 75, 172, 64, 9
    x, scales, whole, expected = product(kind, n, k, block, tokens)
    matmul.matmul(x, scales, whole, expected, tokens)
    w, parts, blocks = normal((n, k), 0, 0.1), random_integers(n, Blocks(k, block)), Blocks(k, block)
    for first, last in [(0, 1), (5, 38), (38, 75), (16, 32), (75, 75)]:
        middle = (first + last) // 2
        if kind == "float":
            shard = matmul.empty_float_weights(last - first, k, block)
        else:
            shard = matmul.empty_integer_weights(last - first, blocks.groups, blocks.groups_per_block)
        for a, b in ((first, middle), (middle, last)):
            if kind == "float":
                matmul.fill_float(shard, a - first, w[a:b])
            else:
                matmul.fill_integer(shard, a - first, *(part[a:b] for part in parts))
        sums = np.empty((tokens, matmul.tiles(last - first) * 16), np.int64)
        assert matmul.matmul(x, scales, shard, sums, tokens, 2) == OK
        assert_same(sums[:, : last - first], expected[:, first:last])


def test_the_largest_integers_are_exact():
    blocks = Blocks(576, 256)
    signs = np.where(normal((3, 576)) > 0, 127, -127).astype(np.int8)
    unit = np.ones((3, blocks.groups), np.float32)
    weights = integer_weights(blocks.pad(signs), unit, np.full(3, 2.0**-10, np.float32), blocks.groups_per_block)
    x = blocks.pad(signs.astype(np.float32)).reshape(3, -1)
    sums = np.empty((3, 16), np.int64)
    assert matmul.matmul(x, unit, weights, sums, 3) == OK
    np.testing.assert_array_equal(sums[:, :3], (signs.astype(np.int64) @ signs.T.astype(np.int64)) << 22)


def test_the_largest_sum_does_not_wrap():
    """4,096 blocks, each just below 2**19."""
    block_value = np.nextafter(np.float32(2**19), np.float32(0))
    weights = float_weights(np.ones((1, 4096), np.float32), 1)
    sums = np.empty((1, 16), np.int64)
    for sign in (1, -1):
        x = np.full((1, 4096), sign * block_value)
        assert matmul.matmul(x, np.zeros((1, 1), np.float32), weights, sums, 1) == OK
        assert int(sums[0, 0]) == 4096 * sign * int(float(block_value) * 2**32)


@pytest.mark.parametrize("value, status", [(2.0**19 - 2**-5, OK), *((bad, OUT_OF_RANGE) for bad in (
    2.0**19, -2.0**19, 3e38, np.inf, -np.inf, np.nan))])
@pytest.mark.parametrize("token", [3, 8])
def test_float_values_out_of_range_add_zero(value, status, token):
    """One element of one token, in a register tile of eight or of its own: the block adds nothing, all else stays."""
    x, scales, weights, sums = product("float", 35, 48, 8, tokens=9)
    weights.values[2, 20, 1] = 1
    weights.values[:, 16:20], weights.values[:, 21:24] = 0, 0
    matmul.matmul(x, scales, weights, sums, 9)
    x[token, 20] = value
    for threads in (1, 2):
        changed, expected = np.empty_like(sums), np.empty_like(sums)
        assert matmul.matmul(x, scales, weights, changed, 9, threads) == status
        assert reference.matmul(x, scales, weights, expected, 9) == status
        assert_same(changed, expected)
        rest = np.arange(9) != token
        assert_same(changed[rest], sums[rest])
    if status:
        weights.values[:, 16:24], x[token, 20] = 0, 0
        matmul.matmul(x, scales, weights, expected, 9)
        assert changed[token, 33] == expected[token, 33]


@pytest.mark.parametrize("scale", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("token", [3, 8])
def test_integer_values_out_of_range_add_zero(scale, token):
    x, scales, weights, sums = product("integer", 35, 172, 64, tokens=9)
    scales[token, 2] = scale                                    # the first group of the second block
    expected = np.empty_like(sums)
    assert reference.matmul(x, scales, weights, expected, 9) == OUT_OF_RANGE
    for threads in (1, 2):
        assert matmul.matmul(x, scales, weights, sums, 9, threads) == OUT_OF_RANGE
        assert_same(sums, expected)
    scales[token, 2:4] = 0
    assert matmul.matmul(x, scales, weights, sums, 9) == OK
    assert_same(sums, expected)
