"""Rotary embedding: the frequencies of Hugging Face transformers, and angles that are exact at any position."""

import json
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from model_shapes import SHAPES
from reference_models import CASES, case, reference

from llama_hpc.errors import UsageError
from llama_hpc.kernels.numerics import cos_sin, turn_fraction
from llama_hpc.model.config import RopeConfig
from llama_hpc.model.rope import attention_factor, inverse_frequencies, tables
from llama_hpc.weights.hf_config import read_hf_config

TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021164194988918461563281257241799725606965068")


def read_case(name, folder):
    (folder / "config.json").write_text(json.dumps(case(name).config))
    return read_hf_config(folder)


def exact_cos_sin(angle):
    """Decimal cosine and sine by their series, after taking whole turns off."""
    angle %= TWO_PI
    cosine, sine, term = Decimal(0), Decimal(0), Decimal(1)
    for n in range(1, 120):
        if n % 2:
            cosine += term if n % 4 == 1 else -term
        else:
            sine += term if n % 4 == 2 else -term
        term = term * angle / n
    return cosine, sine


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name, tmp_path):
    config, expected = read_case(name, tmp_path), reference(name)
    with localcontext() as context:
        context.prec = 50
        found = np.array([float(f) for f in inverse_frequencies(config.rope, config.head_dim)])
        scale = float(attention_factor(config.rope))
    # transformers computes them in float32.
    np.testing.assert_allclose(found, expected.inverse_frequencies.astype(np.float64), rtol=2e-6)
    assert scale == pytest.approx(expected.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_tables_are_cosines_and_sines_of_position_times_frequency(name, tmp_path):
    """Small positions, where float64 of NumPy is an oracle."""
    config, expected = read_case(name, tmp_path), reference(name)
    cosines, sines = tables(config, 100)
    assert cosines.dtype == sines.dtype == np.float32
    angles = np.arange(100)[:, None] * expected.inverse_frequencies.astype(np.float64)
    scale = expected.attention_scaling
    np.testing.assert_allclose(cosines, scale * np.cos(angles), atol=2e-4)
    np.testing.assert_allclose(sines, scale * np.sin(angles), atol=2e-4)


def test_angles_wrap_exactly():
    """At positions where the angle as a float32 would be wrong in its first digit."""
    config = replace(SHAPES["stories260K"], context_length=1 << 18, rope=RopeConfig(theta=500000.0))
    cosines, sines = tables(config, 1 << 18)
    with localcontext() as context:
        context.prec = 80
        for pair in range(config.head_dim // 2):
            frequency = (-Decimal(2 * pair) / config.head_dim * Decimal(500000).ln()).exp()
            for position in (1, 4095, 131071, (1 << 18) - 1):
                cosine, sine = exact_cos_sin(position * frequency)
                assert abs(Decimal(float(cosines[position, pair])) - cosine) < Decimal("6.1e-8")
                assert abs(Decimal(float(sines[position, pair])) - sine) < Decimal("6.1e-8")
            # To the last bit: Python's integers have no rounding.
            exact = [turn_fraction(frequency) * position % 2**64 for position in range(261_000, 1 << 18)]
            expected_cosines, expected_sines = cos_sin(np.array(exact, np.uint64))
            np.testing.assert_array_equal(cosines[261_000:, pair], expected_cosines)
            np.testing.assert_array_equal(sines[261_000:, pair], expected_sines)


@pytest.mark.parametrize("frequency", ["1", "0.31622776601683793", "0.0000001"])
def test_positions_far_beyond_any_context(frequency):
    """Rounding a frequency to 2**-65 turns is 2**-29 turns after 2**36 positions, below the last bit of a float32."""
    position = (1 << 36) + 12345
    turns = np.uint64(turn_fraction(Decimal(frequency)) * position % 2**64)
    cosine, sine = cos_sin(turns)
    with localcontext() as context:
        context.prec = 80
        expected = exact_cos_sin(position * Decimal(frequency))
    assert abs(Decimal(float(cosine)) - expected[0]) < Decimal("8e-8")
    assert abs(Decimal(float(sine)) - expected[1]) < Decimal("8e-8")


def test_position_zero_is_not_turned():
    cosines, sines = tables(SHAPES["Llama-3-8B"], 1)
    assert (cosines == 1).all() and (sines == 0).all()


@pytest.mark.parametrize(("original", "limit"), [(None, 512), (100, 100)])
def test_dynamic_scaling_beyond_the_original_context_is_refused(original, limit):
    """There a key would depend on the final length of its text."""
    rope = RopeConfig(kind="dynamic", factor=2.0, original_context=original)
    config = replace(SHAPES["stories260K"], rope=rope)
    plain = replace(SHAPES["stories260K"], rope=RopeConfig())
    for found, expected in zip(tables(config, limit), tables(plain, limit), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UsageError, match=rf"{limit + 1} positions.*--max-seq-len {limit}"):
        tables(config, limit + 1)
