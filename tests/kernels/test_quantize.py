"""Quantising weights: the Numba build against the plain rule, cuts and threads that change nothing, and the error."""

import os
import platform
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from llama_hpc.kernels import codebook as codebooks
from llama_hpc.kernels import reference_quantize as reference
from llama_hpc.kernels.cpu import quantize
from llama_hpc.kernels.formats import Blocks, concatenate
from llama_hpc.kernels.numerics import OK
from llama_hpc.kernels.reference import embedding, matmul

GEOMETRIES = [(8, 8), (12, 256), (43, 256), (48, 48), (172, 32), (288, 48), (576, 256), (896, 256), (5632, 256)]


def gaussian(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32) * np.float32(0.02)


def awkward(n, k):
    """Gaussian rows, then rows of zeros, equal weights, subnormal, tiny and large weights, and one with an outlier."""
    w = gaussian(max(n, 7), k)
    w[1] = 0
    w[2] = -0.25
    w[3] = np.float32(1e-42)
    w[4] *= np.float32(1e-5)
    w[5] *= np.float32(3e6)
    w[6, k // 2] = 3
    return w


def fit(w, blocks):
    return codebooks.fit_codebook(w[codebooks.sample_rows(*w.shape)], blocks)


def quantized(w, blocks):
    return quantize.quantize_q3_5(w, blocks, fit(w, blocks), quantize.row_maxima(w))


def relative_error(w, packed):
    w = w.astype(np.float64)
    return ((packed.dequantize() - w) ** 2).sum() / (w**2).sum()


def one_scale_a_row(w):
    """Round to nearest with 4 bits a weight: more bits than q3_5, and one scale a row."""
    scale = np.abs(w).max(axis=1, keepdims=True) / 7
    return np.rint(w / scale) * scale


@pytest.mark.parametrize("k, block", GEOMETRIES)
def test_numba_follows_the_reference(k, block):
    w, blocks = awkward(8, k), Blocks(k, block)
    maxima = reference.row_maxima(w)
    np.testing.assert_array_equal(quantize.row_maxima(w), maxima)
    codebook = fit(w[:1], blocks)
    ours = quantize.quantize_q3_5(w, blocks, codebook, maxima)
    assert ours.bytes() == reference.quantize_q3_5(w, blocks, codebook, maxima).bytes()
    assert quantize.quantize_q8(w, blocks).bytes() == reference.quantize_q8(w, blocks).bytes()
    assert quantize.quantize_q4(w, blocks).bytes() == reference.quantize_q4(w, blocks).bytes()
    halves = quantize.quantize_f16(w[:5])
    np.testing.assert_array_equal(halves, reference.quantize_f16(w[:5]))


def test_codebook_fit_follows_the_reference():
    w, blocks = awkward(8, 172), Blocks(172, 64)
    ours = codebooks.fit_codebook(w, blocks)
    np.testing.assert_array_equal(ours, codebooks.fit_codebook(w, blocks, cell_sums=reference.cell_sums))
    assert ours.dtype == np.int8 and ours.shape == (128, 2) and not ours[0].any() and ours.min() >= -127


@pytest.mark.parametrize("k, block", [(172, 32), (288, 48), (1000, 256)])
def test_shards_have_the_bytes_of_the_whole(k, block):
    w, blocks = awkward(9, k), Blocks(k, block)
    codebook, maxima = fit(w, blocks), quantize.row_maxima(w)
    whole, whole_q8 = quantize.quantize_q3_5(w, blocks, codebook, maxima), quantize.quantize_q8(w, blocks)
    whole_q4 = quantize.quantize_q4(w, blocks)
    cuts = [0, 0, block, 3 * block, k]
    columns = [w[:, a:b] for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.max([quantize.row_maxima(part) for part in columns], axis=0), maxima)
    parts, parts_q8, parts_q4 = [], [], []
    for rows in (slice(0, 4), slice(4, 4), slice(4, 9)):
        row = [(part[rows], Blocks(part.shape[1], block)) for part in columns]
        parts.append(concatenate([quantize.quantize_q3_5(*shard, codebook, maxima[rows]) for shard in row], 1))
        parts_q8.append(concatenate([quantize.quantize_q8(*shard) for shard in row], 1))
        parts_q4.append(concatenate([quantize.quantize_q4(*shard) for shard in row], 1))
    assert concatenate(parts, 0).sha256() == whole.sha256()
    assert concatenate(parts_q8, 0).sha256() == whole_q8.sha256()
    assert concatenate(parts_q4, 0).sha256() == whole_q4.sha256()


def test_threads_change_nothing():
    w, blocks = awkward(300, 288), Blocks(288, 256)
    codebook, maxima = fit(w, blocks), quantize.row_maxima(w)
    np.testing.assert_array_equal(codebooks.fit_codebook(w, blocks, threads=2), codebooks.fit_codebook(w, blocks))
    np.testing.assert_array_equal(quantize.row_maxima(w, 2), maxima)
    assert (quantize.quantize_q3_5(w, blocks, codebook, maxima, 2).bytes()
            == quantize.quantize_q3_5(w, blocks, codebook, maxima).bytes())
    assert quantize.quantize_q8(w, blocks, 2).bytes() == quantize.quantize_q8(w, blocks).bytes()
    assert quantize.quantize_q4(w, blocks, 2).bytes() == quantize.quantize_q4(w, blocks).bytes()


DIGEST = """
import sys
import numpy as np
from llama_hpc.kernels import codebook
from llama_hpc.kernels.cpu import quantize
from llama_hpc.kernels.formats import Blocks
from numba.core.registry import cpu_target
w = np.load(sys.argv[1])
blocks = Blocks(w.shape[1], 256)
fitted = codebook.fit_codebook(w, blocks)
print(cpu_target.target_context.codegen()._get_host_cpu_name())
print(quantize.quantize_q3_5(w, blocks, fitted, quantize.row_maxima(w)).sha256())
print(quantize.quantize_q8(w, blocks).sha256())
print(quantize.quantize_q4(w, blocks).sha256())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 target")
def test_instruction_set_changes_nothing(tmp_path):
    w = awkward(64, 288)
    np.save(tmp_path / "w.npy", w)
    blocks = Blocks(288, 256)
    codebook = codebooks.fit_codebook(w, blocks)
    ours = [quantize.quantize_q3_5(w, blocks, codebook, quantize.row_maxima(w)).sha256(),
            quantize.quantize_q8(w, blocks).sha256(), quantize.quantize_q4(w, blocks).sha256()]
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
    done = subprocess.run([sys.executable, "-c", DIGEST, tmp_path / "w.npy"], env=environment, capture_output=True,
                          text=True, timeout=120, check=True)
    assert done.stdout.split() == ["x86-64", *ours]


def test_rows_of_zeros_and_of_equal_weights():
    w = gaussian(64, 288)
    w[7], w[9], w[11] = 0, -0.05, np.float32(1e-42)
    values = quantized(w, Blocks(288, 256)).dequantize()
    assert not values[7].any() and not values[11].any()
    np.testing.assert_allclose(values[9], -0.05, rtol=0.05)
    zeros = np.zeros((4, 288), np.float32)
    assert not quantized(zeros, Blocks(288, 256)).dequantize().any()
    assert not quantize.quantize_q8(zeros, Blocks(288, 256)).dequantize().any()
    values = quantize.quantize_q4(w, Blocks(288, 256)).dequantize()
    assert not values[7].any() and not values[11].any()
    np.testing.assert_allclose(values[9], -0.05, rtol=0.001)


@pytest.mark.parametrize("size", [1e-4, 1e5])
def test_the_size_of_the_weights_does_not_matter(size):
    w = gaussian(128, 576) * np.float32(size)
    assert relative_error(w, quantized(w, Blocks(576, 256))) < 0.0115
    # Factors of the small ones are subnormal as float16.
    assert relative_error(w, quantize.quantize_q4(w, Blocks(576, 256))) < 0.0072


def test_padding_is_coded_as_zeros():
    w, blocks = gaussian(16, 172), Blocks(172, 32)
    for packed in (quantized(w, blocks), quantize.quantize_q8(w, blocks), quantize.quantize_q4(w, blocks)):
        assert not packed.unpack()[0][:, -1, 12:].any()


@pytest.mark.parametrize("value, message", [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (1e7, "8319008")])
def test_weights_that_no_scale_can_hold_are_refused(value, message):
    w, blocks = gaussian(4, 64), Blocks(64, 256)
    codebook = fit(w, blocks)
    w[2, 40] = value
    for call in (lambda: quantize.quantize_q3_5(w, blocks, codebook, quantize.row_maxima(w)),
                 lambda: quantize.quantize_q8(w, blocks), lambda: reference.quantize_q8(w, blocks),
                 lambda: codebooks.fit_codebook(w, blocks)):
        with pytest.raises(ValueError, match=f"row 2 .*{message}"):
            call()


@pytest.mark.parametrize("name, largest", [("q4", 7 * 65504), ("f16", 65504)])
@pytest.mark.parametrize("module", [quantize, reference])
def test_the_largest_weights_of_narrow_formats(module, name, largest):
    convert = module.quantize_f16 if name == "f16" else lambda w: module.quantize_q4(w, Blocks(64, 256))
    w = gaussian(4, 64)
    w[2, 40], w[3, 3] = largest, -largest
    stored = convert(w)
    stored = stored.view(np.float16) if name == "f16" else stored.dequantize()
    np.testing.assert_allclose(stored[[2, 3], [40, 3]], [largest, -largest], rtol=0.12 if name == "q4" else 0)
    assert np.isfinite(stored).all()
    for value, message in ((np.nextafter(np.float32(largest), np.float32(np.inf)), str(largest)), (-np.inf, "infinity"),
                           (np.nan, "NaN")):
        w[1, 5] = value
        with pytest.raises(ValueError, match=f"row 1 .*{message}"):
            convert(w)


def test_half_weights_are_rounded_to_even_and_multiply_as_their_values():
    w = np.array([[1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, -65504, -0.0]], np.float32)
    values = quantize.quantize_f16(w).view(np.float16)
    np.testing.assert_array_equal(values[0], [1, 1 + 2.0**-9, 0, 2.0**-23, -65504, 0])
    assert values.dtype == np.float16 and np.signbit(values[0, 5])
    halves, x = quantize.quantize_f16(gaussian(16, 43)), gaussian(3, 43, 1)
    (status, sums), other = matmul(x, halves, 32), matmul(x, halves.view(np.float16).astype(np.float32), 32)
    assert status == other[0] == OK
    np.testing.assert_array_equal(sums, other[1])
    rows = embedding(halves, np.array([7, 15]), 5, 9)
    np.testing.assert_array_equal(rows, [halves.view(np.float16)[7], np.zeros(43)])


def test_shapes_that_do_not_fit_are_refused():
    w, blocks = gaussian(4, 64), Blocks(64, 256)
    codebook, maxima = fit(w, blocks), quantize.row_maxima(w)
    with pytest.raises(ValueError, match="must be \\[n, 64\\]"):
        quantize.quantize_q8(w[:, :63], blocks)
    with pytest.raises(ValueError, match="4 rows of weights"):
        quantize.quantize_q3_5(w, blocks, codebook, maxima[:3])


def test_q8_is_within_half_a_step():
    w = gaussian(32, 576)
    packed = quantize.quantize_q8(w, Blocks(576, 256))
    step = packed.unpack()[1].repeat(32, axis=1)
    assert (np.abs(packed.dequantize() - w) <= step * 0.5625).all()
    assert relative_error(w, packed) < 3e-5


def q4_0(w):
    """llama.cpp's Q4_0: 4.5 bits as well, the largest weight of a group is -8."""
    groups = w.reshape(len(w), -1, 32)
    at = np.abs(groups).argmax(axis=2, keepdims=True)
    scale = np.take_along_axis(groups, at, 2) / np.float32(-8)
    values = np.clip(np.floor(groups / scale + np.float32(8.5)), 0, 15) - 8
    return (values * scale.astype(np.float16).astype(np.float64)).reshape(w.shape)


def test_q4_is_nearer_than_the_largest_weight_at_minus_eight():
    w = gaussian(256, 1024)
    ours, theirs = relative_error(w, quantize.quantize_q4(w, Blocks(1024, 256))), ((q4_0(w) - w) ** 2).sum() / (w**2).sum()
    assert ours < 0.0066 and ours < 0.9 * theirs


def test_q4_values_are_the_nearest_of_their_factor():
    w, blocks = gaussian(32, 576), Blocks(576, 256)
    values, factors, _ = quantize.quantize_q4(w, blocks).unpack()
    assert values.min() == -8 and values.max() == 7 and (factors < 0).any() and (factors > 0).any()
    every = np.arange(-8, 8)[:, None] * factors.reshape(-1)[:, None, None]
    errors = np.abs(every - blocks.pad(w).reshape(-1, 1, 32).astype(np.float64))
    chosen = np.take_along_axis(errors, values.reshape(-1, 1, 32) + np.int64(8), 1)[:, 0]
    assert (chosen <= errors.min(axis=1) * (1 + 1e-6)).all()


def test_error_of_gaussian_weights():
    w = gaussian(512, 1024)
    packed = quantized(w, Blocks(1024, 256))
    error = relative_error(w, packed)
    rounded = one_scale_a_row(w).astype(np.float64)
    assert error < 0.0112
    assert error < 0.7 * ((rounded - w) ** 2).sum() / (w.astype(np.float64) ** 2).sum()


def test_outliers_cost_little():
    w = gaussian(128, 2048)
    w[:, 100] *= 8
    w[:, 1500] *= 5
    assert relative_error(w, quantized(w, Blocks(2048, 256))) < 0.0135


def test_error_of_trained_weights(test_data):
    """A llama2.c model, float32: weight error and bits a weight of all its projections."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(test_data / "models/stories15M/model.safetensors")
    weights = [w.astype(np.float32) for name, w in tensors.items() if "_proj" in name]
    packed = [quantized(w, Blocks(w.shape[1], 256)) for w in weights]
    packed_q4 = [quantize.quantize_q4(w, Blocks(w.shape[1], 256)) for w in weights]
    for tensors, bound in ((packed, 0.0111), (packed_q4, 0.0068)):
        lost = sum(((p.dequantize() - w.astype(np.float64)) ** 2).sum() for w, p in zip(weights, tensors, strict=True))
        assert lost / sum((w.astype(np.float64) ** 2).sum() for w in weights) < bound
    assert 8 * sum(p.nbytes for p in packed) / sum(w.size for w in weights) < 3.70


def test_sample_depends_on_the_shape_alone():
    for n, k in [(4096, 4096), (10, 4096), (192, 576), (32000, 288)]:
        rows = codebooks.sample_rows(n, k)
        assert len(rows) == min(n, max(64, -(-131072 // k)))
        assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < n
