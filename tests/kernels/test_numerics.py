"""Canonical functions (fused multiply-add, exp, sigmoid, log, cosine, sine) against exact arithmetic and float64."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from kernel_inputs import assert_same
from numba import njit

from llama_hpc.kernels import numerics
from llama_hpc.kernels.cpu import functions, simd

SMALLEST = Fraction(1, 2**149)


def random_bits(n, seed=0):
    """float32 of every size, no NaN or infinity."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, n, np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


def rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact number, half to even, by integer division."""
    magnitude = abs(exact)
    if magnitude == 0:
        return np.float32(0)
    exponent = math.floor(math.log2(magnitude.numerator) - math.log2(magnitude.denominator))
    unit = max(Fraction(2) ** (exponent - 24), SMALLEST)
    while round(magnitude / unit) >= 2**24:             # logarithms only estimate the exponent
        unit *= 2
    value = round(magnitude / unit) * unit
    with np.errstate(over="ignore"):
        return np.float32(float(value)) * np.float32(-1 if exact < 0 else 1)


def hard_triples():
    """a, b, c whose exact a * b + c lies at, or a hair beside, the middle of two float32; and sums that cancel."""
    rng = np.random.default_rng(1)
    c = np.ldexp(rng.integers(2**23, 2**24, 500).astype(np.float32), rng.integers(-60, 60, 500)).astype(np.float32)
    _, exponent = np.frexp(c)
    half = np.ldexp(np.float32(0.5), exponent - 24).astype(np.float32)      # half a unit in the last place of c
    a = rng.choice([-1, 1], 500).astype(np.float32)
    near = half * (1 + rng.choice([-1, 0, 1], 500) * np.float32(2.0**-23)).astype(np.float32)
    x, y = random_bits(600, 2)[:500], np.float32(1) + rng.random(500).astype(np.float32)
    tiny = np.ldexp(rng.integers(1, 2**24, (3, 500)), rng.integers(-100, -70, (3, 500))).astype(np.float32)
    return [(a, near, c), (x, y, -(x * y)), (x, np.ones_like(x), -x), tuple(tiny * [[1], [1], [-(2.0**-60)]]),
            (a * near, np.nextafter(a, np.float32(2)), -c)]


@pytest.mark.filterwarnings("ignore:overflow")
def test_fma_is_rounded_once():
    triples = [(random_bits(1100, s)[:1000], random_bits(1100, s + 10)[:1000], random_bits(1100, s + 20)[:1000])
               for s in range(3)]
    for a, b, c in triples + hard_triples():
        a, b, c = (np.asarray(v, np.float32) for v in (a, b, c))
        result = numerics.fma(a, b, c)
        exact = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(a, b, c, strict=True)]
        np.testing.assert_array_equal(result, np.array([rounded(e) for e in exact], np.float32))


def test_fma_of_single_numbers_infinities_and_nan():
    one, inf = np.float32(1), np.float32(np.inf)
    assert numerics.fma(one, one, one).shape == () and numerics.fma(one, one, one) == 2
    with np.errstate(invalid="ignore"):
        assert numerics.fma(inf, one, one) == inf and numerics.fma(-inf, one, one) == -inf
        assert numerics.fma(one, one, -inf) == -inf
        assert np.isnan(numerics.fma(inf, one, -inf)) and np.isnan(numerics.fma(np.float32(np.nan), one, one))


@njit
def _fma(a, b, c, vectors, scalars):
    for i in range(0, a.shape[0], simd.LANES):
        simd.store(vectors, i, simd.fma(simd.load(a, i), simd.load(b, i), simd.load(c, i)))
    for i in range(a.shape[0]):
        scalars[i] = simd.fma_scalar(a[i], b[i], c[i])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_fma_of_the_processor_is_that_of_the_rule():
    a, b, c = (random_bits(70000, s)[:65536] for s in range(3))
    c[::2] = -(a * b)[::2]
    for triple in hard_triples():
        a[:500], b[:500], c[:500] = triple
        vectors, scalars = np.empty_like(a), np.empty_like(a)
        _fma(a, b, c, vectors, scalars)
        expected = numerics.fma(a, b, c)
        np.testing.assert_array_equal(scalars, expected)
        np.testing.assert_array_equal(vectors, expected)


@njit
def _functions(x, exps, sigmoids):
    for i in range(x.shape[0]):
        exps[i] = functions.exp(x[i])
        sigmoids[i] = functions.sigmoid(x[i])


def spread():
    """float32 over the whole range of exp, at the edges of its reduction, of every size, and special."""
    steps = np.arange(-127, 128) * math.log(2) / 2
    edges = np.concatenate([steps, [-87, 88, -88, 89, -1e30, 1e30, np.inf, -np.inf, 0, -0.0, 1e-45]]).astype(np.float32)
    edges = np.concatenate([np.nextafter(edges, np.float32(-np.inf)), edges, np.nextafter(edges, np.float32(np.inf))])
    return np.concatenate([np.linspace(-90, 90, 200001).astype(np.float32), edges, random_bits(1 << 16)])


def ulps(actual, truth):
    """Error of float32 in units of the last place of the float64 truth."""
    unit = np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)
    return np.abs(actual.astype(np.float64) - truth) / unit


def test_exp_and_sigmoid_of_the_processor_are_those_of_the_rule():
    x = spread()
    exps, sigmoids = np.empty_like(x), np.empty_like(x)
    _functions(x, exps, sigmoids)
    assert_same(exps, numerics.exp(x))
    assert_same(sigmoids, numerics.sigmoid(x))
    _functions(np.array([np.nan], np.float32), exps, sigmoids)
    assert np.isnan(exps[0]) and np.isnan(sigmoids[0])
    with np.errstate(invalid="ignore"):
        assert np.isnan(numerics.exp(np.float32(np.nan)))


def test_exp_is_within_an_ulp():
    x = spread()
    inside = x[(x >= -87) & (x <= 88)]
    assert ulps(numerics.exp(inside), np.exp(inside.astype(np.float64))).max() < 1
    assert not numerics.exp(x[x < -87]).any()
    assert (numerics.exp(x[x > 88]) == numerics.exp(np.float32(88))).all()
    assert numerics.exp(np.float32(0)) == 1 and numerics.exp(np.float32(0)).shape == ()


def test_sigmoid_is_within_three_ulps():
    x = spread()
    x = x[x > -86]
    assert ulps(numerics.sigmoid(x), 1 / (1 + np.exp(-x.astype(np.float64)))).max() < 3
    assert numerics.sigmoid(np.float32(0)) == 0.5 and numerics.sigmoid(np.float32(-100)) == 0


def test_exp_rises():
    x = np.sort(spread())
    assert (np.diff(numerics.exp(x)) >= 0).all()


def test_log_is_within_two_ulps_of_float64():
    rng = np.random.default_rng(0)
    numbers = [*np.ldexp(rng.uniform(1, 2, 2000), rng.integers(-1000, 1000, 2000)), *rng.uniform(0.9, 1.1, 500), 1.0,
               2.0, 2.0**-1022, 1.7e308, 1 + 2.0**-52, 1 - 2.0**-53, math.sqrt(2), math.e]
    for x in map(float, numbers):
        assert abs(numerics.log(x) - math.log(x)) <= 2 * math.ulp(math.log(x)), x
    assert numerics.log(1.0) == 0


def turned(turns: int) -> tuple[float, float]:
    """Cosine and sine of a 64-bit fraction of a turn: the octant is split off in integers, libm does the rest."""
    quarter, rest = divmod(turns + (1 << 61), 1 << 62)
    angle = (rest - (1 << 61)) * 2 * math.pi / 2**64
    c, s = math.cos(angle), math.sin(angle)
    return [(c, s), (-s, c), (-c, -s), (s, -c)][quarter % 4]


def test_cosine_and_sine_are_correctly_rounded_but_for_ties():
    rng = np.random.default_rng(0)
    corners = [eighth * 2**61 + offset for eighth in range(8) for offset in (-1, 0, 1, 2**20, -2**40)]
    turns = np.array([*(corner % 2**64 for corner in corners), *rng.integers(0, 2**64, 5000, np.uint64)], np.uint64)
    cosine, sine = numerics.cos_sin(turns)
    assert cosine.dtype == sine.dtype == np.float32
    truth = np.array([turned(int(t)) for t in turns])
    assert ulps(cosine, truth[:, 0]).max() < 0.5001 and ulps(sine, truth[:, 1]).max() < 0.5001
    quarters = np.arange(4, dtype=np.uint64) << np.uint64(62)
    np.testing.assert_array_equal(numerics.cos_sin(quarters), [[1, 0, -1, 0], [0, 1, 0, -1]])


def test_angles_wrap_exactly():
    """Positions far out: the table against sixty digits."""
    with localcontext() as context:
        context.prec = 60
        frequencies = [Decimal(10000) ** (-Decimal(2 * i) / 48) for i in range(24)]
        steps = [numerics.turn_fraction(f) for f in frequencies]
        turn = 2 * numerics.pi()
        cosines, sines = numerics.rope_table(np.array(steps, np.uint64), 32768)
        for position in (0, 1, 2, 255, 4097, 32767):
            angles = [float(position * f % turn) for f in frequencies]
            np.testing.assert_allclose(cosines[position], np.cos(angles), rtol=0, atol=1e-7)
            np.testing.assert_allclose(sines[position], np.sin(angles), rtol=0, atol=1e-7)
    assert numerics.turn_fraction(Decimal(0)) == 0
    assert numerics.rope_table([1 << 62], 3, 1.5)[0].tolist() == [[1.5], [0], [-1.5]]


def test_pi():
    with localcontext() as context:
        context.prec = 52
        assert str(numerics.pi()).startswith("3.14159265358979323846264338327950288419716939937510"[:48])


@pytest.mark.parametrize("size", [172, 768, 1536, 4095, 4096, 5632, 14336])
def test_the_down_projection_has_blocks_to_deal_out(size):
    block = numerics.down_block(size)
    assert block in (32, 64, 128, 256)
    assert block == 256 or -(-size // (2 * block)) < 16
    assert block == 32 or -(-size // block) >= 16
