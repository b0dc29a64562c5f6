"""Inputs of kernel tests: weights in every format, programs of one operation, quantised activations; and equality of bits."""

import numpy as np

from llama_hpc.kernels.codebook import fit_codebook
from llama_hpc.kernels.cpu import elementwise, quantize, weights
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.simd_int8 import UNIT
from llama_hpc.kernels.cpu.simd_weights import PAIR_ORDER
from llama_hpc.kernels.cpu.workers import WorkDistribution
from llama_hpc.kernels.formats import Packed

FORMATS = "q3_5", "q8", "q4", "f32", "f16"


def assert_same(actual, expected):
    """Equal dtypes, shapes and bits."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits))


def normal(shape, seed=0, size=1.0):
    """Gaussian float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def stored(weights_format, w, blocks):
    """float32 [n, k] in a format: Packed, or a plain array (float16 as uint16)."""
    if weights_format == "f32":
        return w
    if weights_format == "f16":
        return quantize.quantize_f16(w)
    if weights_format == "q3_5":
        return quantize.quantize_q3_5(w, blocks, fit_codebook(w, blocks), quantize.row_maxima(w))
    return {"q8": quantize.quantize_q8, "q4": quantize.quantize_q4}[weights_format](w, blocks)


def rows_of(part, first, stop):
    """Rows first … stop - 1 of what ``stored`` gives."""
    if not isinstance(part, Packed):
        return part[first:stop]
    scales = None if part.row_scales is None else part.row_scales[first:stop]
    return Packed(part.format, stop - first, part.blocks, part.codes[first:stop], part.scales[first:stop], scales, part.codebook)


def kernel_weights(weights_format, part, rows, blocks):
    """What ``stored`` gives as the kernels hold it."""
    held = weights.allocate(weights_format, rows, blocks, getattr(part, "codebook", None))
    weights.fill(held, 0, part)
    return held


def operate(function, dtype, threads=1, **fields):
    """Runs an operation; returns its status. Members take one task at a time."""
    program = Program(shared_pool(threads))
    program.add("test", function, dtype, WorkDistribution("dynamic", 1, 1).record(threads), **fields)
    program.run()
    return int(program.status[0])


def quantize_activation(activation, rows, threads=1):
    """Quantises the first rows of an Activation, which are float32 already; returns the status."""
    return operate(elementwise.quantize_operation, elementwise.NORM, threads, rows=np.array([rows]), target=activation.record)


def quantized(activation, rows):
    """int8 values [rows, groups, 32], scales and corrections [rows, groups] of an Activation, in the order of k."""
    blocks, per_block = activation.blocks, activation.blocks.groups_per_block
    per_unit = UNIT // per_block * per_block
    unit, place = np.divmod(np.arange(blocks.groups), per_unit)
    where = [8 * (k // 8) + PAIR_ORDER.index(k % 8) for k in range(32)]
    x = activation.x.reshape(*activation.x.shape[:2], UNIT, 32)[unit, :rows, place].swapaxes(0, 1)[:, :, where]
    return x, *(array[unit, :rows, place].swapaxes(0, 1) for array in (activation.scales, activation.corrections))
