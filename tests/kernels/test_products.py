"""Products: bits of the plain rule for every format, shape, cut, token count, thread and schedule; what is fused in; range."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from kernel_inputs import FORMATS, assert_same, kernel_weights, normal, quantized, rows_of, stored

from llama_hpc.kernels import reference
from llama_hpc.kernels.cpu import products, target, weights
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, add_quantize, matmul, matvec, products_of, shared_pool
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.team import SCHEDULES
from llama_hpc.kernels.cpu.workers import WorkDistribution
from llama_hpc.kernels.formats import Blocks, Packed
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE

# Outputs, inputs and block: whole and partial panels of 32, tiles of 16, pairs and units of groups, and blocks; more panels than
# are multiplied before their totals are finished.
SHAPES = [(35, 8, 8), (16, 12, 256), (17, 48, 48), (33, 172, 32), (1, 172, 64), (15, 288, 256), (40, 576, 48), (70, 576, 256),
          (64, 1536, 64), (33, 320, 80), (50, 700, 160), (600, 40, 32)]
# Every mixture of register tiles, and one or two chunks of 66.
TOKENS = (*range(1, 10), 13, 33, 67)


def make(weights_format, n, k, block, size=0.1):
    """The weights as stored, and as the kernels hold them."""
    blocks = Blocks(k, block)
    part = stored(weights_format, normal((n, k), 1, size), blocks)
    return part, kernel_weights(weights_format, part, n, blocks)


def sums_of(x, held, threads=1, work=None):
    return products_of(x, held, pool=shared_pool(threads), mode=products.SUMS, work=work)


def expected_outputs(x, part, block, bias=None):
    return reference.finish(reference.matmul(x, part, block)[1], bias)[1]


def activations(rows, k):
    """Gaussian rows, among them a group of zeros and values so small that they count as zeros."""
    x = normal((rows, k), 2)
    x[3 % rows, :8] = 0
    x[4 % rows] *= np.float32(1e-35)
    return x


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("n, k, block", SHAPES)
def test_bits_of_the_reference(n, k, block, weights_format):
    part, held = make(weights_format, n, k, block)
    x = activations(max(TOKENS), k)
    status, expected = reference.matmul(x, part, block)
    assert status == OK
    for tokens in TOKENS:
        for threads in (1, 2):
            status, sums = sums_of(x[:tokens], held, threads)
            assert status == OK
            assert_same(sums, expected[:tokens])


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_change_nothing(schedule, weights_format):
    n, k, block = 330, 96, 32
    part, held = make(weights_format, n, k, block)
    x = activations(71, k)
    expected = reference.matmul(x, part, block)[1]
    small, whole = WorkDistribution(schedule, 32, 64), WorkDistribution(schedule, 1, 4096, 1, tile_rows=64, tile_tokens=8)
    for threads in (1, 2, 3, 8):
        for work in (small, whole):
            for tokens in (1, 5, 71):
                status, sums = sums_of(x[:tokens], held, threads, work)
                assert status == OK
                assert_same(sums, expected[:tokens])


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("n, k, block", SHAPES)
def test_close_to_the_product_in_float64(n, k, block, weights_format):
    """A chain of m terms errs by at most m roundings of the sum of magnitudes; a block, once by the fixed point."""
    part, held = make(weights_format, n, k, block)
    blocks, x = Blocks(k, block), normal((9, k), 2)
    out = matmul(x, held).astype(np.float64)
    if isinstance(part, Packed):
        values, factors, row_scales = part.unpack()
        w = blocks.unpad(values * (factors.astype(np.float64) * row_scales[:, None])[:, :, None])
        _, values, scales = reference.quantize_rows(x, block)
        x, terms = blocks.unpad(values * scales.astype(np.float64)[:, :, None]), blocks.groups_per_block
    else:
        w, terms = (part.view(np.float16) if weights_format == "f16" else part).astype(np.float64), block
    bound = (terms + 4) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T) + blocks.n_blocks * 2.0**-33
    assert (np.abs(out - x @ w.T) <= bound).all()


@pytest.mark.parametrize("weights_format", FORMATS)
def test_without_columns_or_rows(weights_format):
    for n, k, tokens in ((20, 0, 9), (0, 64, 9), (20, 64, 0)):
        held = weights.allocate(weights_format, n, Blocks(k, 32), np.zeros((128, 2), np.int8))
        for threads in (1, 2):
            status, sums = sums_of(normal((tokens, k)), held, threads)
            assert status == OK and sums.shape == (tokens, n) and not sums.any()


@pytest.mark.parametrize("weights_format", FORMATS)
def test_rows_arrive_in_chunks(weights_format):
    """As from the loader; and rows of a shard, cut anywhere, give what those of the whole give."""
    n, k, block = 75, 172, 64
    part, whole = make(weights_format, n, k, block)
    x = normal((9, k), 2)
    expected = sums_of(x, whole)[1]
    for first, last in ((0, n), (0, 1), (5, 38), (38, 75), (16, 32)):
        shard = weights.allocate(weights_format, last - first, Blocks(k, block), getattr(part, "codebook", None))
        for a in range(first, last, 7):
            weights.fill(shard, a - first, rows_of(part, a, min(a + 7, last)))
        if first == 0 and last == n:
            assert_same(shard.data, whole.data)
            assert_same(shard.row_scales, whole.row_scales)
        status, sums = sums_of(x, shard, 2)
        assert status == OK
        assert_same(sums, expected[:, first:last])


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("k, block, cuts", [(576, 64, [0, 3, 3, 4, 9]), (172, 32, [0, 1, 5, 6]), (384, 48, [0, 5, 8])])
def test_columns_cut_at_blocks_add_up(k, block, cuts, weights_format):
    """Shards of a row-parallel layer, one of them possibly empty."""
    n = 35
    part, whole = make(weights_format, n, k, block)
    x = normal((9, k), 2)
    total = np.zeros((9, n), np.int64)
    for first, last in pairwise(cuts):
        columns, blocks = slice(first * block, min(last * block, k)), Blocks(min(last * block, k) - first * block, block)
        if isinstance(part, Packed):
            groups = slice(first * blocks.groups_per_block, last * blocks.groups_per_block)
            shard = replace(part, blocks=blocks, codes=part.codes[:, groups], scales=part.scales[:, groups])
        else:
            shard = part[:, columns]
        status, sums = sums_of(x[:, columns], kernel_weights(weights_format, shard, n, blocks))
        assert status == OK
        total += sums
    assert_same(total, sums_of(x, whole)[1])


def test_memory_is_what_the_format_promises():
    """3.5 bits of codes and 4 of a group's factor, a float32 a row, the table: nothing is widened where codes can be used."""
    blocks, size = Blocks(4096, 256), 4096 * 4096
    codebook = np.zeros((128, 2), np.int8)
    bits = {"q8": 8.5, "q4": 4.5, "f32": 32, "f16": 16, "q3_5": 3.625 if target.kernels() == "vbmi" else 8.125}
    table = 256 if target.kernels() == "vbmi" else 0
    for weights_format in FORMATS:
        held = weights.allocate(weights_format, 4096, blocks, codebook)
        expected = size * bits[weights_format] / 8 + 4096 * 4 + (table if weights_format == "q3_5" else 0)
        assert held.nbytes == weights.allocated_bytes(weights_format, 4096, blocks) == expected
    for n, k, block in SHAPES:
        for weights_format in FORMATS:
            held = weights.allocate(weights_format, n, Blocks(k, block), codebook)
            assert held.nbytes == weights.allocated_bytes(weights_format, n, Blocks(k, block))


@pytest.mark.parametrize("weights_format", ["q8", "q4", "q3_5"])
def test_the_largest_integers_are_exact(weights_format):
    """Every weight and every activation at an end of its range, in some rows all of one sign."""
    blocks, n, rng = Blocks(576, 256), 20, np.random.default_rng(0)
    part = stored(weights_format, normal((n, 576)), blocks)
    if weights_format == "q3_5":
        part = replace(part, codebook=rng.choice(np.array([-127, 127], np.int8), (128, 2)))
    else:
        ends = np.array([-127, 127], np.int8) if weights_format == "q8" else np.array([0x00, 0xFF, 0x0F, 0xF0], np.uint8)
        part.codes[:] = rng.choice(ends, part.codes.shape)
        part.codes[0], part.codes[1] = ends[:2]
        part.scales[:] = np.float16(2.0**-10).view(np.uint16)
    x = rng.choice(np.array([-127, 127], np.float32), (9, 576))
    x[:2] = np.array([[127], [-127]])
    status, sums = sums_of(x, kernel_weights(weights_format, part, n, blocks))
    assert status == OK
    assert_same(sums, reference.matmul(x, part, 256)[1])
    if weights_format != "q3_5":
        assert (sums == (x.astype(np.int64) @ blocks.unpad(part.unpack()[0]).T.astype(np.int64)) << 22).all()


def test_the_largest_sum_does_not_wrap():
    """4,096 blocks, each just below 2**19."""
    block_value = np.nextafter(np.float32(2**19), np.float32(0))
    held = kernel_weights("f32", np.ones((1, 4096), np.float32), 1, Blocks(4096, 1))
    for sign in (1, -1):
        status, sums = sums_of(np.full((1, 4096), sign * block_value), held)
        assert status == OK and int(sums[0, 0]) == 4096 * sign * int(float(block_value) * 2**32)


@pytest.mark.parametrize("value, status", [(2.0**19 - 2**-5, OK), (-2.0**19 + 2**-5, OK), *((bad, OUT_OF_RANGE) for bad in (
    2.0**19, -2.0**19, 3e38, np.inf, -np.inf, np.nan))])
@pytest.mark.parametrize("token", [3, 8])
@pytest.mark.parametrize("weights_format", ["f32", "f16"])
def test_float_blocks_out_of_range_are_told(value, status, token, weights_format):
    """One element of one token, in a register tile of several or of its own; what others hold stays."""
    w = normal((35, 48), 1, 0.1)
    w[:, 16:24], w[33, 20] = 0, 1
    part = stored(weights_format, w, Blocks(48, 8))
    held, x = kernel_weights(weights_format, part, 35, Blocks(48, 8)), normal((9, 48), 2)
    expected, rest = sums_of(x, held)[1], np.arange(9) != token
    x[token, 20] = value
    for threads in (1, 2):
        found, sums = sums_of(x, held, threads)
        assert found == reference.matmul(x, part, 8)[0] == status
        assert_same(sums[rest], expected[rest])


@pytest.mark.parametrize("weights_format", ["q3_5", "q8", "q4"])
@pytest.mark.parametrize("token", [0, 3, 8])
def test_integer_blocks_out_of_range_are_told(token, weights_format):
    part, held = make(weights_format, 35, 172, 64)
    x = normal((9, 172), 2)
    expected, rest = sums_of(x, held)[1], np.arange(9) != token
    x[token, 70:90] *= np.float32(1e9)                           # in the second block
    for threads in (1, 2):
        found, sums = sums_of(x, held, threads)
        assert found == reference.matmul(x, part, 64)[0] == OUT_OF_RANGE
        assert_same(sums[rest], expected[rest])


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_told(bad, weights_format):
    part, held = make(weights_format, 35, 172, 64)
    for column in (0, 31, 100, 171):
        x = normal((3, 172))
        x[1, column] = bad
        assert reference.matmul(x, part, 64)[0] == (NOT_FINITE if isinstance(part, Packed) else OUT_OF_RANGE)
        assert products_of(x, held)[0] != OK
        with pytest.raises(FloatingPointError):
            matmul(x, held)


def run_product(x, parts, layout, mode, threads=1, gated=None, block=64):
    """Runs a product of several parts, with several threads panel by panel; returns the status of the product."""
    activation = Activation(len(x), x.shape[1], block, layout not in ("f32", "f16"))
    activation.values[:] = x
    program, tokens = Program(shared_pool(threads)), np.array([len(x)])
    if activation.quantized:
        add_quantize(program, "x", activation, tokens)
    work = WorkDistribution("dynamic", 32, 32) if threads > 1 else None
    add_product(program, "product", activation, parts, layout, tokens, mode, work, gated)
    program.run()
    return int(program.status[-1])


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_parts_of_one_product(biased, weights_format):
    """q, k and v: each goes to an array of its own, with rows as long as that array's, or is added to what is there."""
    k, widths, room = 172, (330, 32, 17), (340, 32, 17)
    made = [make(weights_format, n, k, 64) for n in widths]
    biases = [normal(n, n) if biased else None for n in widths]
    for tokens in (1, 3, 11, 68):
        x = normal((tokens, k), 2)
        expected = [expected_outputs(x, part, 64, bias) for (part, _), bias in zip(made, biases, strict=True)]
        for mode, threads in ((products.FLOAT, 1), (products.FLOAT, 3), (products.ADD, 2)):
            outs = [normal((tokens, n), 5) for n in room]
            before = [out.copy() for out in outs]
            parts = [held.part(out, bias) for (_, held), out, bias in zip(made, outs, biases, strict=True)]
            assert run_product(x, parts, made[0][1].layout, mode, threads) == OK
            for out, old, y in zip(outs, before, expected, strict=True):
                n = y.shape[1]
                assert_same(out[:, :n], old[:, :n] + y if mode == products.ADD else y)
                assert_same(out[:, n:], old[:, n:])


def test_a_status_names_the_part():
    """Two bits a part; outputs are out of range from 2**20 on, in whole panels and in partial ones."""
    widths = 17, 64, 35
    for wrong, part in ((0, 0), (1, 1), (1, 2)):
        row = (5, 40, 33)[part]
        w = [np.zeros((n, 8), np.float32) for n in widths]
        w[part][row] = 1
        held = [kernel_weights("f32", value, len(value), Blocks(8, 1)) for value in w]
        x = np.zeros((3, 8), np.float32)
        x[wrong, :3] = 2.0**19 - 2**-5, 2.0**19 - 2**-5, 1
        outs = [np.zeros((3, n), np.float32) for n in widths]
        parts = [value.part(out) for value, out in zip(held, outs, strict=True)]
        assert run_product(x, parts, "f32", products.FLOAT, block=1) == OUT_OF_RANGE << (2 * part)
        x[wrong, 2] = 0
        assert run_product(x, parts, "f32", products.FLOAT, block=1) == OK


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("n, block", [(172, 32), (172, 64), (320, 256)])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_fused(biased, n, block, weights_format):
    k = 172
    (gate, held_gate), (up, held_up) = make(weights_format, n, k, 64, 0.3), make(weights_format, n, k, 64, 0.2)
    codebooks = [getattr(part, "codebook", None) for part in (gate, up)]
    pair = weights.allocate_pair(weights_format, n, Blocks(k, 64), codebooks)
    for held, part in zip(pair, (gate, up), strict=True):
        weights.fill(held, 0, part)
    biases = (normal(n, 7), normal(n, 8)) if biased else (None, None)
    for tokens, threads, held in ((1, 1, pair), (5, 1, pair), (9, 2, pair), (9, 1, (held_gate, held_up)), (68, 1, pair)):
        x = normal((tokens, k), 2)
        values = [expected_outputs(x, part, 64, bias) for part, bias in zip((gate, up), biases, strict=True)]
        expected = reference.silu_multiply(*values)
        gated = Activation(tokens + 1, n, block, isinstance(gate, Packed))
        gated.values[tokens:] = 5
        parts = [each.part(None, bias) for each, bias in zip(held, biases, strict=True)]
        assert run_product(x, parts, held_gate.layout, products.GATED, threads, gated) == OK
        assert_same(gated.values[:tokens], expected)
        assert (gated.values[tokens:] == 5).all()
        if gated.quantized:
            assert_quantized(gated, expected, block)


def test_gate_and_up_alternate_in_memory():
    """Panel by panel, as they are read; each has its own rows in its own panels."""
    gate, up = weights.allocate_pair("q8", 70, Blocks(64, 64))
    panel = 2 * gate.data.shape[2]
    assert gate.data.shape == up.data.shape == (3, 2, gate.data.shape[2]) and gate.data.strides[0] == 2 * panel
    assert up.data.__array_interface__["data"][0] - gate.data.__array_interface__["data"][0] == panel
    assert not np.shares_memory(gate.data, up.data)


def assert_quantized(activation, expected, block):
    status, values, scales = reference.quantize_rows(expected, block)
    assert status == OK
    found = quantized(activation, len(expected))
    assert_same(found[0], values)
    assert_same(found[1], scales)
    assert_same(found[2], -128 * values.sum(axis=2, dtype=np.int32))


@pytest.mark.parametrize("which", [0, 1])
def test_gate_and_up_out_of_range_are_told(which):
    """Each has bits of its own; in a whole panel, and in a partial one."""
    for row in (20, 33):
        w = np.zeros((2, 35, 8), np.float32)
        w[which, row] = 1
        held = [kernel_weights("f32", value, 35, Blocks(8, 1)) for value in w]
        for last, status in ((1, OUT_OF_RANGE << (2 * which)), (0, OK)):
            x, gated = np.zeros((9, 8), np.float32), Activation(9, 35, 64, True)
            x[7, :3] = 2.0**19 - 2**-5, 2.0**19 - 2**-5, last
            assert run_product(x, [value.part() for value in held], "f32", products.GATED, 1, gated, block=1) == status


@pytest.mark.parametrize("weights_format", FORMATS)
def test_matmul_and_matvec(weights_format):
    part, held = make(weights_format, 50, 172, 64)
    x = normal((7, 172), 2)
    expected = expected_outputs(x, part, 64)
    assert_same(matmul(x, held), expected)
    assert_same(matmul(x, held, work=WorkDistribution("steal", 1, 1), pool=shared_pool(2)), expected)
    out = np.full((7, 50), np.nan, np.float32)
    assert matmul(x, held, out) is out
    assert_same(out, expected)
    assert_same(matvec(x[2], held), expected[2])
    row = np.full(50, np.nan, np.float32)
    assert np.shares_memory(matvec(x[2], held, out=row), row)
    assert_same(row, expected[2])
    with pytest.raises(FloatingPointError, match=r"\(7, 172\)"):
        matmul(x * np.float32(1e9), held)
