"""Norms, quantised activations, ends of products, embeddings, float16: bits, accuracy, range."""

from fractions import Fraction

import numpy as np
import pytest
from kernel_inputs import FORMATS, assert_same, kernel_weights, normal, operate, quantize_activation, quantized, stored
from numba import njit

from llama_hpc.kernels import reference
from llama_hpc.kernels.cpu import elementwise, functions, joining
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.formats import Blocks, Packed
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE

# (k, block) of activations: whole and partial groups, blocks and units of eight groups.
GEOMETRIES = [(8, 8), (12, 256), (48, 48), (172, 32), (288, 256), (576, 64), (576, 48), (700, 160)]


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


def norm(x, weight, eps, rows=None, selected=None, block=256, with_quantized=True, threads=1, target=None):
    """Runs ``norm_operation``; returns (status, the Activation)."""
    rows = len(x) if rows is None else rows
    target = target or Activation(len(x), x.shape[1], block, with_quantized)
    status = operate(elementwise.norm_operation, elementwise.NORM, threads, rows=np.array([rows]), residual=x, stride=x.shape[1],
                     columns=x.shape[1], weight=weight, eps=np.array([eps]), selected=selected, target=target.record)
    return status, target


@pytest.mark.parametrize("n", [8, 17, 288, 576])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.0])
def test_rms_norm(n, eps):
    x, weight = np.delete(awkward(9, n), 1, axis=0), normal(n, 1)
    expected = np.empty_like(x)
    assert reference.rms_norm(x, weight, eps, expected, 7) == OK
    for threads in (1, 2):
        status, out = norm(x, weight, eps, 7, with_quantized=False, threads=threads)
        assert status == OK
        assert_same(out.values[:7], expected[:7])
        assert not out.values[7:].any()
    exact = x.astype(np.float64)
    truth = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + eps) * weight
    usual = np.arange(7) != 1                       # squares of values below 2**-100 count less than exactly
    np.testing.assert_allclose(out.values[:7][usual], truth[:7][usual], rtol=4e-7)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 25100, 1e18, 1e20, 1e37])
def test_rms_norm_of_any_size(size):
    """Squares of float32 values beyond 1e19 or below 1e-23 would leave float32."""
    x, weight = normal((3, 576)) * np.float32(size / 8), np.ones(576, np.float32)
    status, out = norm(x, weight, 0.0)
    assert status == OK
    exact = x.astype(np.float64)
    np.testing.assert_allclose(out.values, exact / np.sqrt((exact**2).mean(axis=1, keepdims=True)), rtol=4e-7)


def test_rms_norm_of_zeros():
    zeros = np.zeros((1, 48), np.float32)
    status, out = norm(zeros, np.ones(48, np.float32), 1e-5)
    assert status == OK and not out.values.any() and not out.x.any() and not out.scales.any()


@pytest.mark.parametrize("k, block", GEOMETRIES)
def test_a_norm_quantises_what_it_makes(k, block):
    """All rows, or those that are selected."""
    x, weight = np.delete(awkward(9, k), 1, axis=0), normal(k, 1)
    selected = np.array([7, 0, 3], np.int64)
    for rows, choice in ((8, None), (3, selected)):
        taken, expected = x if choice is None else x[choice], np.empty((rows, k), np.float32)
        assert reference.rms_norm(taken[:rows], weight, 1e-5, expected, rows) == OK
        status, out = norm(x, weight, 1e-5, rows, choice, block)
        assert status == OK
        assert_same(out.values[:rows], expected)
        assert_quantized(out, expected, block)


def assert_quantized(activation, x, block):
    status, values, scales = reference.quantize_rows(x, block)
    assert status == OK
    found = quantized(activation, len(x))
    assert_same(found[0], values)
    assert_same(found[1], scales)
    assert_same(found[2], -128 * values.sum(axis=2, dtype=np.int32))


@pytest.mark.parametrize("k, block", GEOMETRIES)
def test_quantised_rows(k, block):
    x, blocks = awkward(8, k), Blocks(k, block)
    for threads in (1, 2):
        activation = Activation(10, k, block, True)
        activation.values[:8] = x
        arrays = activation.x, activation.scales, activation.corrections
        for array in arrays:
            array[:] = 99
        assert quantize_activation(activation, 7, threads) == OK
        assert_quantized(activation, x[:7], block)
        assert all((array[:, 7:] == 99).all() for array in arrays)
    values, scales, _ = quantized(activation, 7)
    assert np.abs(values).max() == 127 and not values[[1, 2]].any() and not scales[[1, 2]].any()
    assert not values[:, blocks.pad(np.ones(k)) == 0].any()
    decoded = blocks.unpad(values * scales[:, :, None].astype(np.float64))
    step = blocks.unpad(np.broadcast_to(scales[:, :, None], values.shape).astype(np.float64))
    assert (np.abs(decoded - x[:7])[3:] <= step[3:] * 0.50002).all()


def test_quantised_values_round_half_to_even():
    for columns in (32, 8):
        activation = Activation(1, columns, 256, True)
        activation.values[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127]
        assert quantize_activation(activation, 1) == OK
        values, scales, _ = quantized(activation, 1)
        assert values[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, 126, -127] and scales[0, 0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_told(bad):
    x, weight = normal((3, 172)), np.ones(172, np.float32)
    for column in (0, 31, 100, 171):
        broken, activation = x.copy(), Activation(3, 172, 64, True)
        broken[1, column] = bad
        activation.values[:] = broken
        for rows, status in ((3, NOT_FINITE), (1, OK)):
            assert norm(broken, weight, 1e-5, rows, block=64)[0] == status
            assert reference.rms_norm(broken, weight, 1e-5, x.copy(), rows) == status
            assert quantize_activation(activation, rows) == status
            assert reference.quantize_rows(broken[:rows], 64)[0] == status


def nearest(fraction, kind):
    """The floating-point number of a kind nearest to a fraction, half to even."""
    middle = kind(float(fraction))
    around = [np.nextafter(middle, kind(-np.inf)), middle, np.nextafter(middle, kind(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - fraction), int(f.view(np.uint32)) & 1))


def finish(sums, bias, residual, rows, threads=1):
    """The join of one part, or of several: then ``sums`` is split into parts of either sign."""
    parts = [np.ascontiguousarray(sums - sums // 3 * 2), *(np.ascontiguousarray(sums // 3) for _ in range(2))]
    found, before = [], residual.copy()
    for held in ([sums], parts):
        residual[:], spent = before, np.zeros(1, np.int64)
        status = operate(joining.join_operation, joining.JOIN, threads, rows=np.array([rows]), columns=sums.shape[1],
                         parts=np.array([address(part) for part in held]), ranks=len(held), kind=joining.FINISH,
                         target=residual, bias=bias, spent=spent)
        assert spent[0] > 0
        found.append((status, residual.tobytes()))
    assert found[0] == found[1]
    return status


@pytest.mark.parametrize("n", [1, 17, 35, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_finish(n, biased):
    rng = np.random.default_rng(1)
    sums = rng.integers(-2**52, 2**52, (6, n))
    sums >>= rng.integers(0, 50, sums.shape)
    bias = normal(n) if biased else None
    status, expected = reference.finish(sums, bias)
    assert status == OK
    for threads in (1, 2):
        residual = normal((6, n), 2)
        before = residual.copy()
        assert finish(sums, bias, residual, 5, threads) == OK
        assert_same(residual[:5], before[:5] + expected[:5])
        assert_same(residual[5:], before[5:])
    if not biased:
        zeros = np.zeros((6, n), np.float32)
        assert finish(sums, None, zeros, 6) == OK
        assert all(y == nearest(Fraction(int(total), 2**32), np.float32) for y, total in zip(zeros.flat, sums.flat, strict=True))


@pytest.mark.parametrize("value, status", [(2**52 - 2**28, OK), (2**52, OUT_OF_RANGE), (-2**52, OUT_OF_RANGE),
                                           (2**52 - 1, OUT_OF_RANGE), (2**62, OUT_OF_RANGE)])
def test_outputs_out_of_range_are_told(value, status):
    """2**52 - 1 rounds to 2**20. A bias does not bring a value back."""
    sums = np.zeros((3, 9), np.int64)
    sums[1, 4] = value
    for bias in (None, -np.ones(9, np.float32)):
        assert reference.finish(sums, bias)[0] == finish(sums, bias, np.zeros((3, 9), np.float32), 3) == status
        assert reference.finish(sums[:1], bias)[0] == finish(sums, bias, np.zeros((3, 9), np.float32), 1) == OK


TOKENS = np.array([0, 16, 20, 54, 55, 56, 90, 19, 99], np.int32)
FORMS = {"q8": elementwise.INT8, "q4": elementwise.INT4, "f32": elementwise.FLOAT32, "f16": elementwise.FLOAT16}


@pytest.mark.parametrize("weights_format", [name for name in FORMATS if name in FORMS])
@pytest.mark.parametrize("first, held", [(0, 100), (20, 35), (50, 0)])
@pytest.mark.parametrize("columns", [12, 172, 288])
def test_embedding(first, held, columns, weights_format):
    """A rank that holds rows first … first + held - 1 of the table gives zeros for all others."""
    blocks = Blocks(columns, 256)
    table = stored(weights_format, normal((100, columns)), blocks)
    part = table.rows(first) if isinstance(table, Packed) else table[first:]
    weights = kernel_weights(weights_format, part, 100 - first, blocks)
    expected = reference.embedding(table, TOKENS, first, held)
    for threads in (1, 2):
        out = np.full((9, columns + 4), np.nan, np.float32)
        assert operate(elementwise.embedding_operation, elementwise.EMBEDDING, threads, rows=np.array([8]), tokens=TOKENS,
                       first=first, held=held, columns=columns, data=weights.data, tile_bytes=weights.data.strides[1],
                       form=FORMS[weights_format], out=out, stride=out.shape[1]) == OK
        assert_same(out[:8, :columns], expected[:8])
        assert np.isnan(out[8]).all() and np.isnan(out[:, columns:]).all()


@njit
def half_bits(x, out):
    for i in range(x.size):
        out[i] = functions.half_bits(x[i])


@njit
def half_values(bits, out):
    for i in range(bits.size):
        out[i] = functions.half_value(bits[i])


@njit
def sigmoids(x, out):
    for i in range(x.size):
        out[i] = functions.sigmoid(x[i])


def test_every_float16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    values, back = np.empty(bits.size, np.float32), np.empty_like(bits)
    half_values(bits, values)
    assert_same(values, bits.view(np.float16).astype(np.float32))
    half_bits(values, back)
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
    out = np.empty(x.size, np.uint16)
    half_bits(x, out)
    assert_same(out, reference.half_bits(x))
    assert_same(out, x.astype(np.float16).view(np.uint16))


def test_values_beyond_float16_are_not_finite():
    x, out = np.array([65520, -65520, 1e30, np.inf, -np.inf, np.nan], np.float32), np.empty(6, np.uint16)
    half_bits(x, out)
    assert (out & 0x7C00 == 0x7C00).all()


def test_silu():
    """The reference is close to the exact function, and the compiled sigmoid has its bits."""
    gate = np.concatenate([awkward(9, 172).reshape(-1), np.linspace(-120, 120, 1001, dtype=np.float32)])
    up, out = normal(gate.size, 4), np.empty_like(gate)
    sigmoids(gate, out)
    assert_same(out, reference.sigmoid(gate))
    with np.errstate(over="ignore"):
        truth = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(reference.silu_multiply(gate, up), truth, rtol=5e-7, atol=1e-35)
