"""Kernels on a real GPU give the bits of the plain reference for 1 to 257 tokens and for columns as large as models have."""

import numpy as np
import pytest
from test_cuda_products import Case, quantized, rows_of, weights_of

from llama_hpc.kernels import reference
from llama_hpc.kernels.cuda import products
from llama_hpc.kernels.cuda.activations import Activation, quantize_rows, rms_norm
from llama_hpc.kernels.cuda.kv_store import rotate_and_store
from llama_hpc.kernels.cuda.weights import lay_out
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import OK, PAGE, rope_table

COUNTS = 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257
COLUMNS = 172, 576, 4096, 28672
FORMATS = "q3_5", "q4", "q8", "f16", "f32"
OUTPUTS = 40


def check_products(device, weights_format, columns, counts):
    """Products of so many rows, all of which are compared with one of the reference."""
    x, weights = rows_of(max(counts), columns), weights_of(weights_format, OUTPUTS, columns, 256)
    _, expected = reference.finish(reference.matmul(x, weights, 256)[1])
    for count in counts:
        case = Case(device, x[:count], 256, quantized(weights_format))
        out = case.zeros(OUTPUTS)
        assert case.run([weights], products.FLOAT, [out]) == OK
        assert case.fetched(out).tobytes() == expected[:count].tobytes(), count


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("weights_format", FORMATS)
def test_products(gpu, weights_format, columns):
    check_products(gpu, weights_format, columns, COUNTS)


@pytest.mark.parametrize("weights_format", FORMATS)
def test_products_of_some_rows(device, weights_format):
    check_products(device, weights_format, 172, (1, 9, 33))


@pytest.mark.parametrize("columns", COLUMNS)
def test_norm_and_quantisation(gpu, columns):
    x, weight = rows_of(257, columns), rows_of(1, columns, 1)[0]
    expected = np.empty_like(x)
    assert reference.rms_norm(x, weight, 1e-5, expected, 257) == OK
    _, values, scales = reference.quantize_rows(expected, 256)
    residual, weight = gpu.upload(x), gpu.upload(weight)
    for count in COUNTS:
        rows, status = (gpu.upload(np.array([value], np.int32)) for value in (count, OK))
        normed, again = (Activation(gpu, count, columns, 256, True) for _ in range(2))
        rms_norm(gpu, residual, weight, 1e-5, normed, rows, count, status)
        gpu.upload(expected[:count], again.values)
        quantize_rows(gpu, again, rows, count, status)
        assert gpu.download(status)[0] == OK and gpu.download(normed.values).tobytes() == expected[:count].tobytes()
        for target in (normed, again):
            assert np.array_equal(gpu.download(target.x), values[:count])
            assert gpu.download(target.scales).tobytes() == scales[:count].tobytes()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("weights_format", FORMATS)
def test_embedding(gpu, weights_format, columns):
    table, tokens = weights_of(weights_format, OUTPUTS, columns, 256), np.arange(257, dtype=np.int32) * 7 % 50
    expected = reference.embedding(table, tokens, 0, OUTPUTS)
    held, there = lay_out(table, Blocks(columns, 256)).upload(gpu), gpu.upload(tokens)
    out, rows = gpu.zeros((257, columns), np.float32), gpu.upload(np.array([257], np.int32))
    products.embedding(gpu, held, there, 0, OUTPUTS, rows, 257, out)
    assert gpu.download(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_and_storing(gpu, head_dim):
    heads, kv_heads, count = 8, 2, 257
    q, k, v = (rows_of(count, n * head_dim, seed) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    tables = rope_table(np.random.default_rng(0).integers(0, 2**64, head_dim // 2, np.uint64), 300)
    sequences, positions = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
    pages = np.random.default_rng(1).permutation(20).astype(np.int32).reshape(1, 20)
    pools = [np.zeros((20, kv_heads, head_dim, PAGE), np.uint16), np.zeros((20, kv_heads, PAGE, head_dim), np.uint16)]
    given = [gpu.upload(x) for x in (q, k, v, *tables, sequences, positions, pages, *pools)]
    rows, status = (gpu.upload(np.array([value], np.int32)) for value in (count, OK))
    rotate_and_store(gpu, *given, heads, kv_heads, head_dim, rows, count, status)
    for x in (q, k):
        reference.rope(x, *tables, positions, count)
    reference.store(reference.half_bits(k), reference.half_bits(v), *pools, pages, sequences, positions, count)
    assert gpu.download(status)[0] == OK and gpu.download(given[0]).tobytes() == q.tobytes()
    assert all(gpu.download(found).tobytes() == pool.tobytes() for found, pool in zip(given[-2:], pools, strict=True))
