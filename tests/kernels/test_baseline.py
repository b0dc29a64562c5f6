"""Scalar products: the bits of the kernels for every format, and no vector instructions."""

import re

import numpy as np
import pytest
from numba import njit

from llama_hpc.kernels.codebook import start_codebook
from llama_hpc.kernels.cpu import baseline
from llama_hpc.kernels.cpu.calls import matmul
from llama_hpc.kernels.cpu.quantize import quantize_f16, quantize_q3_5, quantize_q4, quantize_q8, row_maxima
from llama_hpc.kernels.cpu.weights import allocate, fill
from llama_hpc.kernels.formats import Blocks

CODEBOOK = start_codebook(110)
QUANTIZE = {
    "q3_5": lambda w, blocks: quantize_q3_5(w, blocks, CODEBOOK, row_maxima(w)), "q4": quantize_q4, "q8": quantize_q8,
    "f16": lambda w, blocks: quantize_f16(w), "f32": lambda w, blocks: w,
}


@pytest.mark.parametrize("weights_format", QUANTIZE)
@pytest.mark.parametrize("columns, block", [(300, 256), (172, 64), (48, 48)])
def test_bits_of_the_kernels(weights_format, columns, block):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal((n, columns), np.float32) for n in (35, 3))
    x[1, :40] = 0
    blocks = Blocks(columns, block)
    plain = QUANTIZE[weights_format](w, blocks)
    weights = allocate(weights_format, 35, blocks, CODEBOOK)
    fill(weights, 0, plain)
    found = baseline.Baseline(x, plain, block).run()
    np.testing.assert_array_equal(found.view(np.int32), matmul(x, weights).view(np.int32))
    assert np.abs(found - x @ w.T).max() < {"q3_5": 12, "q4": 8, "q8": 1}.get(weights_format, 0.1)


def test_nothing_is_vectorised(monkeypatch):
    product = njit(baseline._integer_product.py_func)
    monkeypatch.setattr(baseline, "_integer_product", product)
    baseline.Baseline(np.ones((1, 64), np.float32), quantize_q8(np.ones((1, 64), np.float32), Blocks(64, 64)), 64).run()
    (assembly,) = product.inspect_asm().values()
    assert "mul" in assembly
    assert not re.findall(r"\bv?p(?:mul|madd|add|dp)\w*", assembly)
