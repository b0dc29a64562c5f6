"""Products on a device give the bits of the plain reference: every format, mode, number of tokens and kind of block."""

import numpy as np
import pytest

from llama_hpc.kernels import reference, reference_quantize
from llama_hpc.kernels.cuda import products
from llama_hpc.kernels.cuda.activations import Activation, quantize_rows
from llama_hpc.kernels.cuda.products import Part, Scratch
from llama_hpc.kernels.cuda.weights import lay_out
from llama_hpc.kernels.formats import Blocks, Packed, pack_codes
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE

FORMATS = ["q3_5", "q4", "q8", "f32", "f16"]
# Outputs, k, and k per reduction block.
SHAPES = [(40, 172, 256), (64, 576, 256), (33, 96, 8), (96, 320, 64), (31, 288, 48), (32, 1100, 256), (7, 40, 32)]


def weights_of(weights_format, outputs, columns, block, seed=0, scale=0.05):
    """Some weights of a format, as ``lay_out`` and ``reference.matmul`` take them."""
    rng, blocks = np.random.default_rng((seed, outputs, columns)), Blocks(columns, block)
    w = rng.standard_normal((outputs, columns), np.float32) * np.float32(scale)
    if weights_format in ("q8", "q4"):
        return {"q8": reference_quantize.quantize_q8, "q4": reference_quantize.quantize_q4}[weights_format](w, blocks)
    if weights_format != "q3_5":
        return w if weights_format == "f32" else reference_quantize.quantize_f16(w)
    codebook = rng.integers(-127, 128, (128, 2), np.int8)
    codebook[0] = 0
    scales = (rng.random(outputs) * scale / 50).astype(np.float16).view(np.uint16)
    return Packed("q3_5", outputs, blocks, pack_codes(rng.integers(0, 128, (outputs, blocks.groups, 16), np.uint8)),
                  rng.integers(0, 16, (outputs, blocks.groups), np.uint8), scales, codebook)


def rows_of(count, columns, seed=0):
    return np.random.default_rng((seed, count, columns)).standard_normal((count, columns), np.float32)


class Case:
    """Activations on a device, what is wanted of their products, and room for those."""

    def __init__(self, device, x, block, quantized, spare=1):
        self.device, self.x, self.count, self.block = device, x, len(x), block
        self.activation = Activation(device, self.count + spare, x.shape[1], block, quantized)
        self.most = self.count + spare
        device.upload(x, self.activation.values[: self.count])
        self.rows, self.status = (device.upload(np.array([value], np.int32)) for value in (self.count, OK))
        if quantized:
            quantize_rows(device, self.activation, self.rows, self.most, self.status)
        self.scratch = Scratch(device, 2048)

    def run(self, weights, mode, outs, biases=(None, None, None), gated=None):
        parts = [Part(lay_out(w, Blocks(self.x.shape[1], self.block)).upload(self.device), out,
                      None if bias is None else self.device.upload(bias))
                 for w, out, bias in zip(weights, outs, biases, strict=False)]
        products.product(self.device, self.activation, parts, self.rows, self.most, mode, self.status, gated, self.scratch)
        assert not self.device.download(self.scratch.sums).any() and not self.device.download(self.scratch.arrived).any()
        return int(self.device.download(self.status)[0])

    def zeros(self, outputs, dtype=np.float32):
        return self.device.zeros((self.most, outputs), dtype)

    def fetched(self, out):
        """The rows there are; the others were left as they were."""
        whole = self.device.download(out)
        assert not whole[self.count :].any()
        return whole[: self.count]


def quantized(weights_format):
    return weights_format not in ("f32", "f16")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 9, 17])
@pytest.mark.parametrize("weights_format", FORMATS)
def test_sums(device, weights_format, count):
    outputs, columns, block = SHAPES[count % len(SHAPES)]
    x, weights = rows_of(count, columns), weights_of(weights_format, outputs, columns, block)
    case = Case(device, x, block, quantized(weights_format))
    out = case.zeros(outputs, np.int64)
    assert case.run([weights], products.SUMS, [out]) == OK
    assert np.array_equal(case.fetched(out), reference.matmul(x, weights, block)[1])


@pytest.mark.parametrize("outputs,columns,block", SHAPES)
@pytest.mark.parametrize("weights_format", FORMATS)
def test_shapes(device, weights_format, outputs, columns, block):
    x, weights = rows_of(2, columns), weights_of(weights_format, outputs, columns, block)
    case = Case(device, x, block, quantized(weights_format))
    out = case.zeros(outputs)
    assert case.run([weights], products.FLOAT, [out]) == OK
    _, expected = reference.finish(reference.matmul(x, weights, block)[1])
    assert case.fetched(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("weights_format", FORMATS)
def test_parts_with_biases_and_added_outputs(device, weights_format):
    x, sizes = rows_of(3, 288), (96, 33, 31)
    weights = [weights_of(weights_format, size, 288, 256, seed) for seed, size in enumerate(sizes)]
    biases = [rows_of(1, 96)[0], None, rows_of(1, 31)[0]]
    expected = [reference.finish(reference.matmul(x, w, 256)[1], bias)[1] for w, bias in zip(weights, biases, strict=True)]
    case = Case(device, x, 256, quantized(weights_format))
    outs = [case.zeros(size) for size in sizes]
    assert case.run(weights, products.FLOAT, outs, biases) == OK
    for out, y in zip(outs, expected, strict=True):
        assert case.fetched(out).tobytes() == y.tobytes()
    assert case.run(weights, products.ADD, outs, biases) == OK
    for out, y in zip(outs, expected, strict=True):
        assert case.fetched(out).tobytes() == (y + y).tobytes()


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("outputs,block", [(96, 32), (160, 64), (288, 256), (40, 256)])
def test_gated(device, weights_format, outputs, block):
    check_gated(device, rows_of(3, 160), weights_format, outputs, block, outputs == 40)


def check_gated(device, x, weights_format, outputs, block, biased):
    gate, up = (weights_of(weights_format, outputs, 160, 256, seed, 1) for seed in (1, 2))
    biases = [rows_of(1, outputs, 3)[0] if biased else None for _ in range(2)]
    g, u = (reference.finish(reference.matmul(x, w, 256)[1], bias)[1] for w, bias in zip((gate, up), biases, strict=True))
    expected = reference.silu_multiply(g, u)
    case = Case(device, x, 256, quantized(weights_format))
    target = Activation(device, case.most, outputs, block, quantized(weights_format))
    assert case.run([gate, up], products.GATED, [None, None], biases, target) == OK
    assert case.fetched(target.values).tobytes() == expected.tobytes()
    if target.quantized:
        _, values, scales = reference.quantize_rows(expected, block)
        assert np.array_equal(case.fetched(target.x), values)
        assert case.fetched(target.scales).tobytes() == scales.tobytes()


def ones(weights_format, outputs, columns):
    """Weights that are about 1, in blocks of 256."""
    w, blocks = np.ones((outputs, columns), np.float32), Blocks(columns, 256)
    if weights_format != "q3_5":
        packed = {"q8": reference_quantize.quantize_q8, "q4": reference_quantize.quantize_q4}.get(weights_format)
        return packed(w, blocks) if packed else w if weights_format == "f32" else reference_quantize.quantize_f16(w)
    codebook = np.zeros((128, 2), np.int8)
    codebook[1] = 127
    return Packed("q3_5", outputs, blocks, pack_codes(np.ones((outputs, blocks.groups, 16), np.uint8)),
                  np.full((outputs, blocks.groups), 4, np.uint8), np.full(outputs, 1 / 118, np.float16).view(np.uint16), codebook)


@pytest.mark.parametrize("count,mode", [(1, products.FLOAT), (3, products.GATED), (9, products.ADD), (34, products.ADD),
                                        (34, products.GATED)])
@pytest.mark.parametrize("weights_format", FORMATS)
def test_what_is_out_of_range_is_told(device, weights_format, count, mode):
    # Outputs beyond 2**20 of block values within 2**19; block values beyond; neither.
    for value, columns, status in ((1600, 1024, OUT_OF_RANGE), (2200, 256, OUT_OF_RANGE), (1600, 512, OK)):
        x = np.zeros((count, columns), np.float32)
        x[count - 1] = -value
        weights = ones(weights_format, 3, columns)
        told, sums = reference.matmul(x, weights, 256)
        assert told | reference.finish(sums)[0] == status
        case = Case(device, x, 256, quantized(weights_format), 0)
        if mode == products.GATED:
            good, target = weights_of(weights_format, 3, columns, 256, scale=1e-3), Activation(device, count, 3, 256, False)
            assert case.run([good, weights], mode, [None, None], gated=target) == status
        else:
            assert case.run([weights], mode, [case.zeros(3)]) == status


@pytest.mark.parametrize("weights_format", FORMATS)
def test_what_is_not_finite_is_told(device, weights_format):
    x = rows_of(2, 96)
    x[1, 50] = np.inf
    case = Case(device, x, 256, quantized(weights_format), 0)
    found = case.run([weights_of(weights_format, 40, 96, 256)], products.FLOAT, [case.zeros(40)])
    assert found & (NOT_FINITE if quantized(weights_format) else OUT_OF_RANGE)


@pytest.mark.parametrize("outputs,columns,block", SHAPES)
@pytest.mark.parametrize("weights_format", ["q3_5", "q4", "q8"])
def test_many_tokens(device, weights_format, outputs, columns, block):
    count = {7: 130, 64: 127}.get(outputs, 33)
    x, sizes = rows_of(count, columns), (outputs, 31, 70)
    weights = [weights_of(weights_format, size, columns, block, seed) for seed, size in enumerate(sizes)]
    biases = [rows_of(1, outputs)[0], None, None]
    case = Case(device, x, block, True)
    launches = getattr(device, "launches", None)
    outs = [case.zeros(size) for size in sizes]
    assert case.run(weights, products.FLOAT, outs, biases) == OK
    assert launches is None or device.launches == launches + 1
    for out, w, bias in zip(outs, weights, biases, strict=True):
        assert case.fetched(out).tobytes() == reference.finish(reference.matmul(x, w, block)[1], bias)[1].tobytes()
    if outputs == 33:
        sums = case.zeros(outputs, np.int64)
        assert case.run(weights[:1], products.SUMS, [sums]) == OK
        assert np.array_equal(case.fetched(sums), reference.matmul(x, weights[0], block)[1])


def test_many_tokens_where_blocks_have_little_shared_memory(device, monkeypatch):
    monkeypatch.setattr(device, "architecture", 75)
    x, weights = rows_of(35, 96), weights_of("q3_5", 40, 96, 32)
    case = Case(device, x, 32, True)
    launches = getattr(device, "launches", None)
    assert case.run([weights], products.SUMS, [out := case.zeros(40, np.int64)]) == OK
    assert launches is None or device.launches == launches + 5
    assert np.array_equal(case.fetched(out), reference.matmul(x, weights, 32)[1])


@pytest.mark.parametrize("weights_format", ["q3_5", "q4", "q8"])
@pytest.mark.parametrize("outputs,block", [(96, 32), (40, 256)])
def test_gated_many_tokens(device, weights_format, outputs, block):
    check_gated(device, rows_of(35, 160), weights_format, outputs, block, True)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 31, 64, 257])
@pytest.mark.parametrize("outputs,columns,block", [(64, 172, 64), (1024, 576, 256), (320, 4096, 256), (100, 28672, 256)])
@pytest.mark.parametrize("weights_format", FORMATS)
def test_large_shapes(gpu, weights_format, outputs, columns, block, count):
    x, w = rows_of(count, columns), weights_of(weights_format, outputs, columns, block, scale=0.01)
    case = Case(gpu, x, block, quantized(weights_format))
    outs = [case.zeros(size) for size in (outputs, outputs)]
    assert case.run([w, w], products.FLOAT, outs) == OK
    _, expected = reference.finish(reference.matmul(x, w, block)[1])
    assert [case.fetched(out).tobytes() == expected.tobytes() for out in outs] == [True, True]


def test_no_rows(device):
    case = Case(device, rows_of(0, 96), 256, True)
    assert case.run([weights_of("q8", 40, 96, 256)], products.FLOAT, [out := case.zeros(40)]) == OK
    assert not device.download(out).any()


def test_what_does_not_fit(device):
    case = Case(device, rows_of(1, 96), 256, True)
    out, weights = case.zeros(40), [weights_of("q8", 40, 96, 256), weights_of("q4", 40, 96, 256)]
    with pytest.raises(ValueError, match="one format"):
        case.run(weights, products.FLOAT, [out, out])
    with pytest.raises(ValueError, match="two of one size"):
        case.run(weights[:1], products.GATED, [out], gated=case.activation)
    with pytest.raises(ValueError, match="do not take 40 outputs"):
        case.run([weights[0]] * 2, products.GATED, [out] * 2, gated=case.activation)


@pytest.mark.parametrize("weights_format", ["q8", "q4", "f32", "f16"])
@pytest.mark.parametrize("first,held", [(0, 100), (20, 35), (50, 0)])
@pytest.mark.parametrize("columns,block", [(12, 256), (172, 256), (288, 48), (300, 256)])
def test_embedding(device, first, held, columns, block, weights_format):
    """A rank that holds rows first … first + held - 1 of the table gives zeros for all others."""
    tokens = np.array([0, 16, 20, 54, 55, 56, 90, 19, 99], np.int32)
    table = weights_of(weights_format, 100, columns, block)
    part = table.rows(first) if isinstance(table, Packed) else table[first:]
    weights = lay_out(part, Blocks(columns, block)).upload(device)
    out, rows = device.zeros((9, columns), np.float32), device.upload(np.array([8], np.int32))
    products.embedding(device, weights, device.upload(tokens), first, held, rows, 9, out)
    assert device.download(out)[:8].tobytes() == reference.embedding(table, tokens, first, held)[:8].tobytes()
    assert not device.download(out)[8].any()


@pytest.mark.parametrize("biased", [False, True])
def test_finish(device, biased):
    sums = np.random.default_rng(1).integers(-(1 << 52) + 1, 1 << 52, (3, 300))
    residual, bias = rows_of(3, 300), rows_of(1, 300)[0] if biased else None
    told, y = reference.finish(sums[:2], bias)
    given, total = device.upload(residual), device.upload(sums)
    rows, status = (device.upload(np.array([value], np.int32)) for value in (2, OK))
    products.finish(device, total, rows, 3, given, None if bias is None else device.upload(bias), status)
    assert told == device.download(status)[0] == OK
    assert device.download(given).tobytes() == np.concatenate([residual[:2] + y, residual[2:]]).tobytes()
    sums[1, 299] = -(1 << 52)
    products.finish(device, device.upload(sums, total), rows, 3, given, None, status)
    assert device.download(status)[0] == OUT_OF_RANGE
