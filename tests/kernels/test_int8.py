"""int8 products (VNNI, VBMI): the bits of the float products from the same packed weights, on all shapes and threads."""

import numpy as np
import pytest
from kernel_inputs import assert_same, normal

from llama_hpc.kernels.codebook import fit_codebook
from llama_hpc.kernels.cpu import elementwise, int8_weights, matmul, target
from llama_hpc.kernels.cpu.quantize import quantize_q3_5, quantize_q8, row_maxima
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE

KINDS = [("q8", "bytes", "vnni"), ("q3_5", "bytes", "vnni"), ("q3_5", "pairs", "vbmi")]
SHAPES = [(35, 8, 8), (16, 12, 256), (17, 48, 48), (33, 172, 32), (1, 172, 64), (15, 288, 256), (40, 576, 48), (70, 576, 256)]
TOKENS = 19


def packed(weights_format, n, blocks):
    w = normal((n, blocks.size), 1, 0.1)
    if weights_format == "q8":
        return quantize_q8(w, blocks)
    return quantize_q3_5(w, blocks, fit_codebook(w, blocks), row_maxima(w))


def empty(layout, part):
    shape = part.n, part.blocks.groups, part.blocks.groups_per_block
    if layout == "pairs":
        return int8_weights.empty_pair_weights(*shape, part.codebook)
    return int8_weights.empty_byte_weights(*shape, np.uint16 if part.format == "q8" else np.float32)


def float_sums(part, x):
    """The same product by the float kernels, which the other tests compare with the reference."""
    blocks = part.blocks
    weights = matmul.empty_integer_weights(part.n, blocks.groups, blocks.groups_per_block)
    matmul.fill_integer(weights, 0, *part.unpack())
    operand, scales = np.empty((len(x), blocks.padded), np.float32), np.empty((len(x), blocks.groups), np.float32)
    assert elementwise.quantize_rows(x, blocks.block, operand, scales, len(x)) == OK
    sums = np.empty((len(x), matmul.tiles(part.n) * matmul.LANES), np.int64)
    assert matmul.matmul(operand, scales, weights, sums, len(x)) == OK
    return sums


def int8_operand(x, blocks):
    shape = blocks.n_blocks, len(x) + 3, blocks.groups_per_block
    operand = np.full((*shape[:2], shape[2] * 32), 99, np.int8)
    scales, corrections = np.full(shape, np.nan, np.float32), np.full(shape, 99, np.int32)
    assert elementwise.quantize_rows_int8(x, blocks.block, operand, scales, corrections, len(x)) == OK
    return operand, scales, corrections


def needs(kernels):
    if target.KERNELS.index(target.kernels()) > target.KERNELS.index(kernels):
        pytest.skip(f"this processor has no {kernels} kernels")


@pytest.mark.parametrize("weights_format, layout, kernels", KINDS)
@pytest.mark.parametrize("n, k, block", SHAPES)
def test_bits_of_the_float_products(weights_format, layout, kernels, n, k, block):
    needs(kernels)
    blocks, x = Blocks(k, block), normal((TOKENS, k), 2)
    part = packed(weights_format, n, blocks)
    weights, expected = empty(layout, part), float_sums(part, x)
    # Rows arrive in chunks, as from the loader.
    for first in range(0, n, 7):
        stop = min(first + 7, n)
        weights.fill(first, packed_rows(part, first, stop))
    operand, scales, corrections = int8_operand(x, blocks)
    for tokens in (1, 2, 4, 5, 12, 13, TOKENS):
        for threads in (1, 2):
            sums = np.full_like(expected, -1)
            assert matmul.matmul(operand, scales, weights, sums, tokens, threads, corrections) == OK
            assert_same(sums[:tokens], expected[:tokens])
            assert (sums[tokens:] == -1).all()


def packed_rows(part, first, stop):
    tail = part.rows(first)
    keep = stop - first
    scales = None if tail.row_scales is None else tail.row_scales[:keep]
    return type(part)(part.format, keep, part.blocks, tail.codes[:keep], tail.scales[:keep], scales, part.codebook)


@pytest.mark.parametrize("weights_format, layout, kernels", KINDS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_values_out_of_range_are_told(weights_format, layout, kernels, tokens):
    needs(kernels)
    blocks = Blocks(64, 256)
    part = packed(weights_format, 32, blocks)
    weights = empty(layout, part)
    weights.fill(0, part)
    operand, scales, corrections = int8_operand(normal((tokens, 64), 2, 1e8), blocks)
    sums = np.empty((tokens, 32), np.int64)
    assert matmul.matmul(operand, scales, weights, sums, tokens, 1, corrections) == OUT_OF_RANGE


def test_activations_that_are_not_finite_are_told():
    x = normal((2, 64))
    x[1, 40] = np.nan
    arguments = np.empty((1, 2, 64), np.int8), np.empty((1, 2, 2), np.float32), np.empty((1, 2, 2), np.int32)
    assert elementwise.quantize_rows_int8(x, 64, *arguments, 2) == NOT_FINITE


def test_memory_is_what_the_format_promises():
    """3.5 bits of codes and 4 of a group's factor, a float32 a row, the table: nothing is widened."""
    blocks = Blocks(4096, 256)
    codebook = np.zeros((128, 2), np.int8)
    pairs = int8_weights.empty_pair_weights(4096, blocks.groups, blocks.groups_per_block, codebook)
    assert pairs.nbytes == 4096 * 4096 * 3.625 / 8 + 4096 * 4 + 256
    half = int8_weights.empty_byte_weights(4096, blocks.groups, blocks.groups_per_block, np.uint16)
    assert half.nbytes == 4096 * 4096 * 8.5 / 8 + 4096 * 4


def test_embedding_rows_from_bytes():
    blocks = Blocks(288, 256)
    part = packed("q8", 37, blocks)
    weights = empty("bytes", part)
    weights.fill(0, part)
    # A share of a table that starts at token 2: tokens 0 and 40 lie elsewhere.
    tokens, out = np.array([0, 36, 5, 40, 2], np.int32), np.empty((5, 288), np.float32)
    elementwise.byte_embedding(weights.values, weights.factors, weights.row_scales, 288, tokens, 2, 35, out, 5)
    expected = np.zeros_like(out)
    expected[[1, 2, 4]] = part.dequantize()[[34, 3, 0]]
    assert_same(out, expected)
