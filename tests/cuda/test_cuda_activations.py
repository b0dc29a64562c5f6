"""Norm and quantisation on a device give the bits of the plain reference."""

import numpy as np
import pytest

from llama_hpc.kernels import reference
from llama_hpc.kernels.cuda.activations import Activation, quantize_rows, rms_norm
from llama_hpc.kernels.numerics import NOT_FINITE, OK


def rows_of(count, columns, seed=0):
    """Some of everything: small, large and vanishing groups."""
    rng = np.random.default_rng((seed, count, columns))
    x = rng.standard_normal((count, columns), np.float32)
    x[:, columns // 2 :] *= np.float32(25100)
    x[0, : columns // 3] = np.float32(1e-35)
    x[-1, :2] = 0
    return x


def flags(device, *values):
    return [device.upload(np.array([value], np.int32)) for value in values]


@pytest.mark.parametrize("count,columns,block", [(1, 172, 256), (3, 576, 256), (2, 320, 8), (2, 288, 48), (4, 1536, 64)])
def test_norm_and_quantisation(device, count, columns, block):
    x, weight = rows_of(count, columns), np.random.default_rng(1).standard_normal(columns).astype(np.float32)
    expected = np.empty_like(x)
    assert reference.rms_norm(x, weight, 1e-5, expected, count) == OK
    _, values, scales = reference.quantize_rows(expected, block)
    target, (rows, status) = Activation(device, count + 1, columns, block, True), flags(device, count, 0)
    rms_norm(device, device.upload(x), device.upload(weight), 1e-5, target, rows, count + 1, status)
    assert device.download(status)[0] == OK
    assert device.download(target.values)[:count].tobytes() == expected.tobytes()
    assert np.array_equal(device.download(target.x)[:count], values)
    assert device.download(target.scales)[:count].tobytes() == scales.tobytes()
    again = Activation(device, count, columns, block, True)
    device.upload(expected, again.values)
    quantize_rows(device, again, rows, count, status)
    assert np.array_equal(device.download(again.x), values)


def test_selected_rows(device):
    x, weight, expected = rows_of(5, 64), np.ones(64, np.float32), np.empty((2, 64), np.float32)
    reference.rms_norm(x[[4, 1]], weight, 1e-6, expected, 2)
    target, (rows, status) = Activation(device, 2, 64, 256, False), flags(device, 2, 0)
    rms_norm(device, device.upload(x), device.upload(weight), 1e-6, target, rows, 2, status,
             device.upload(np.array([4, 1], np.int32)))
    assert device.download(target.values).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(device, bad):
    x = rows_of(2, 96)
    x[1, 70] = bad
    target, (rows, status) = Activation(device, 2, 96, 256, True), flags(device, 2, 0)
    rms_norm(device, device.upload(x), device.upload(np.ones(96, np.float32)), 1e-5, target, rows, 2, status)
    assert device.download(status)[0] == NOT_FINITE
    (status,) = flags(device, 0)
    device.upload(x, target.values)
    quantize_rows(device, target, rows, 2, status)
    assert device.download(status)[0] == NOT_FINITE
