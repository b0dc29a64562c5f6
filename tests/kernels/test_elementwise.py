"""Norms, activation quantisation, RoPE, SiLU, ends of products, float16, embeddings: bits, accuracy, range."""

from fractions import Fraction

import numpy as np
import pytest
from kernel_inputs import assert_same, float_weights, integer_weights, normal, random_integers

from llama_hpc.kernels import reference
from llama_hpc.kernels.cpu import elementwise
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE, rope_table

KERNELS = elementwise, reference
NO_BIAS = np.zeros(0, np.float32)
# (k, block) of activations.
GEOMETRIES = [(8, 8), (12, 256), (48, 48), (172, 32), (288, 256), (576, 64), (576, 48)]


def awkward(rows, n):
    """Gaussian rows, then rows of zeros (of both signs), subnormal, tiny and huge values, and one with an outlier."""
    x = normal((max(rows, 7), n), 3)
    x[1] = 0
    x[1, ::2] = -0.0
    x[2] *= np.float32(1e-40)
    x[3] *= np.float32(1e-29)
    x[4] *= np.float32(1e25)
    x[5, n // 2] = -30000
    x[6, :] = 7
    return x


@pytest.mark.parametrize("n", [8, 17, 288, 576])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.0])
def test_rms_norm(n, eps):
    x, weight = np.delete(awkward(9, n), 1, axis=0), normal(n, 1)
    out, expected = np.full_like(x, -1), np.full_like(x, -1)
    assert elementwise.rms_norm(x, weight, eps, out, 7) == reference.rms_norm(x, weight, eps, expected, 7) == OK
    assert_same(out, expected)
    assert (out[7:] == -1).all()
    exact = x.astype(np.float64)
    truth = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + eps) * weight
    usual = np.arange(7) != 1                       # squares of values below 2**-100 count less than exactly
    np.testing.assert_allclose(out[:7][usual], truth[:7][usual], rtol=4e-7)
    elementwise.rms_norm(x, weight, eps, x, 7)
    assert_same(x[:7], out[:7])


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 25100, 1e18, 1e20, 1e37])
def test_rms_norm_of_any_size(size):
    """Squares of float32 values beyond 1e19 or below 1e-23 would leave float32."""
    x, weight = normal((3, 576)) * np.float32(size / 8), np.ones(576, np.float32)
    out = np.empty_like(x)
    assert elementwise.rms_norm(x, weight, 0.0, out, 3) == OK
    exact = x.astype(np.float64)
    np.testing.assert_allclose(out, exact / np.sqrt((exact**2).mean(axis=1, keepdims=True)), rtol=4e-7)


def test_rms_norm_of_zeros():
    zeros, out = np.zeros((1, 48), np.float32), np.ones((1, 48), np.float32)
    for kernel in KERNELS:
        assert kernel.rms_norm(zeros, np.ones(48, np.float32), 1e-5, out, 1) == OK
        assert not out.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_reported(bad):
    x, out, scales = normal((3, 172)), np.empty((3, 192), np.float32), np.empty((3, 6), np.float32)
    for column in (0, 31, 100, 171):
        broken = x.copy()
        broken[1, column] = bad
        for kernel in KERNELS:
            assert kernel.rms_norm(broken, np.ones(172, np.float32), 1e-5, x.copy(), 3) == NOT_FINITE
            assert kernel.quantize_rows(broken, 64, out, scales, 3) == NOT_FINITE
            assert kernel.rms_norm(broken, np.ones(172, np.float32), 1e-5, x.copy(), 1) == OK
            assert kernel.quantize_rows(broken, 64, out, scales, 1) == OK


@pytest.mark.parametrize("k, block", GEOMETRIES)
def test_quantize_rows(k, block):
    x, blocks = awkward(8, k), Blocks(k, block)
    out, expected = np.full((2, 8, blocks.padded), -1, np.float32)
    scales, expected_scales = np.full((2, 8, blocks.groups), -1, np.float32)
    assert elementwise.quantize_rows(x, block, out, scales, 7) == OK
    assert reference.quantize_rows(x, block, expected, expected_scales, 7) == OK
    assert_same(out, expected)
    assert_same(scales, expected_scales)
    groups = out[:7].reshape(7, -1, 32)
    assert not (groups != np.rint(groups)).any() and np.abs(groups).max() == 127
    assert not groups[:, blocks.pad(np.ones(k)) == 0].any()
    assert not groups[[1, 2]].any() and not scales[[1, 2]].any()
    decoded = blocks.unpad(groups * scales[:7, :, None].astype(np.float64))
    step = blocks.unpad(np.broadcast_to(scales[:7, :, None], groups.shape).astype(np.float64))
    assert (np.abs(decoded - x[:7])[3:] <= step[3:] * 0.50002).all()


def test_quantised_values_round_half_to_even():
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127]
    out, scales = np.empty((1, 32), np.float32), np.empty((1, 1), np.float32)
    assert elementwise.quantize_rows(x, 256, out, scales, 1) == OK
    assert out[0, :8].tolist() == [127, 0, 2, 2, 0, -2, 126, -127] and scales[0, 0] == 1


def nearest(fraction, kind):
    """The floating-point number of a kind nearest to a fraction, half to even."""
    middle = kind(float(fraction))
    around = [np.nextafter(middle, kind(-np.inf)), middle, np.nextafter(middle, kind(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - fraction), int(f.view(np.uint32)) & 1))


@pytest.mark.parametrize("n", [1, 17, 35])
@pytest.mark.parametrize("biased", [False, True])
def test_finish(n, biased):
    rng = np.random.default_rng(1)
    sums = rng.integers(-2**52, 2**52, (6, -(-n // 16) * 16))
    sums >>= rng.integers(0, 50, sums.shape)
    bias, residual = normal(n) if biased else NO_BIAS, normal((6, n), 2)
    out, expected = residual.copy(), residual.copy()
    assert elementwise.finish(sums, bias, out, 5) == reference.finish(sums, bias, expected, 5) == OK
    assert_same(out, expected)
    assert_same(out[5:], residual[5:])
    if not biased:
        assert all(y == nearest(Fraction(int(total), 2**32), np.float32)
                   for y, total in zip(out[:5].flat, sums[:5, :n].flat, strict=True))
    added, expected_sum = residual.copy(), residual.copy()
    assert elementwise.finish_add(sums, bias, added, 5) == reference.finish_add(sums, bias, expected_sum, 5) == OK
    assert_same(added, expected_sum)
    assert_same(added[:5], residual[:5] + out[:5])


@pytest.mark.parametrize("value, status", [(2**52 - 2**28, OK), (2**52, OUT_OF_RANGE), (-2**52, OUT_OF_RANGE),
                                           (2**52 - 1, OUT_OF_RANGE), (2**62, OUT_OF_RANGE)])
def test_outputs_out_of_range_are_reported(value, status):
    """2**52 - 1 rounds to 2**20."""
    sums = np.zeros((3, 16), np.int64)
    sums[1, 4] = value
    for kernel in KERNELS:
        for end in (kernel.finish, kernel.finish_add):
            out = np.zeros((3, 9), np.float32)
            assert end(sums, NO_BIAS, out, 3) == end(sums, -np.ones(9, np.float32), out, 3) == status
            assert end(sums, NO_BIAS, out, 1) == end(sums, NO_BIAS, out[:, :4], 3) == OK


def test_silu_multiply():
    gate, up = awkward(9, 172), normal((9, 172), 4)
    gate[7] = np.linspace(-120, 120, 172)
    out, expected = np.full_like(gate, -1), np.full_like(gate, -1)
    assert elementwise.silu_multiply(gate, up, out, 8) == reference.silu_multiply(gate, up, expected, 8) == OK
    assert_same(out, expected)
    with np.errstate(over="ignore"):
        truth = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(out[:8], truth[:8], rtol=5e-7, atol=1e-35)
    elementwise.silu_multiply(gate, up, gate, 8)
    assert_same(gate[:8], out[:8])


@pytest.mark.parametrize("head_dim, heads", [(8, 3), (12, 1), (48, 6), (64, 9)])
def test_rope(head_dim, heads):
    """Each pair turns by position x 10000**(-2 i / head_dim)."""
    frequencies = 10000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)
    turns = [round(f / (2 * np.pi) * 2**64) for f in frequencies]
    cosines, sines = rope_table(np.array(turns, np.uint64), 1000)
    positions = np.array([0, 1, 7, 256, 999], np.int32)
    x = normal((6, heads * head_dim))
    out, expected = x.copy(), x.copy()
    for kernel, array in ((elementwise, out), (reference, expected)):
        assert kernel.rope(array, cosines, sines, positions, 5) == OK
    assert_same(out, expected)
    assert_same(out[[0, 5]], x[[0, 5]])
    first, second = x[:5].reshape(5, heads, 2, -1).astype(np.float64).transpose(2, 0, 1, 3)
    turned = (first + 1j * second) * np.exp(1j * positions[:, None] * frequencies)[:, None]
    truth = np.stack([turned.real, turned.imag], axis=2).reshape(5, -1)
    np.testing.assert_allclose(out[:5], truth, atol=1e-6)


def half_of(x):
    out = np.empty((1, x.size), np.uint16)
    return elementwise.to_half(x.reshape(1, -1), out, 1), out[0]


def test_every_float16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    status, back = half_of(bits.view(np.float16).astype(np.float32))
    assert status == OK
    assert_same(back, bits)


def test_float16_rounding_is_that_of_numpy():
    """Midpoints between neighbours, the float32 on either side of them, and random bits."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / np.float32(2)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    small = normal(1 << 16) * np.float32(2.0**-14)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf)), small,
                        random[np.abs(random) < 65520], np.array([65519.996, 0.0, 1e-45], np.float32)])
    x = np.concatenate([x, -x])
    status, bits = half_of(x)
    assert status == OK
    assert_same(bits, x.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("bad", [65520, -65520, 1e30, np.inf, -np.inf, np.nan])
def test_values_beyond_float16_are_reported(bad):
    x, out = normal((3, 20)), np.empty((3, 20), np.uint16)
    x[1, 7] = bad
    for kernel in KERNELS:
        assert kernel.to_half(x, out, 3) == OUT_OF_RANGE
        assert kernel.to_half(x, out, 1) == OK


TOKENS = np.array([0, 16, 20, 54, 55, 56, 90, 19, 99], np.int32)


@pytest.mark.parametrize("first, held", [(0, 100), (20, 35), (50, 0)])
@pytest.mark.parametrize("columns", [12, 288])
def test_float_embedding(first, held, columns):
    """A rank that holds rows first … first + held - 1 of the table gives zeros for all others."""
    table = normal((100, columns))
    weights = float_weights(table[first : first + held], 256)
    truth = table[TOKENS] * ((first <= TOKENS) & (first + held > TOKENS))[:, None]
    for kernel in KERNELS:
        out = np.full((9, columns), np.nan, np.float32)
        assert kernel.float_embedding(weights.values, columns, TOKENS, first, held, out, 8) == OK
        np.testing.assert_array_equal(out[:8], truth[:8])
        assert np.isnan(out[8]).all()


@pytest.mark.parametrize("first, held", [(0, 100), (20, 35), (50, 0)])
@pytest.mark.parametrize("columns", [12, 172, 288])
def test_integer_embedding(first, held, columns):
    blocks = Blocks(columns, 256)
    values, factors, row_scales = random_integers(100, blocks)
    rows = slice(first, first + held)
    weights = integer_weights(values[rows], factors[rows], row_scales[rows], blocks.groups_per_block)
    table = blocks.unpad(values.astype(np.float32) * factors[:, :, None] * row_scales[:, None, None])
    truth = table[TOKENS] * ((first <= TOKENS) & (first + held > TOKENS))[:, None]
    for kernel in KERNELS:
        out = np.full((9, columns), np.nan, np.float32)
        status = kernel.integer_embedding(weights.values, weights.factors, weights.row_scales, columns, TOKENS, first,
                                          held, out, 8)
        assert status == OK
        np.testing.assert_array_equal(out[:8], truth[:8])
        assert np.isnan(out[8]).all()
