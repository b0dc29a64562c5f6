"""Single products on a device, and weights on their way there."""

import numpy as np
import pytest
from test_cuda_products import FORMATS, weights_of

from llama_hpc.kernels import reference, reference_quantize
from llama_hpc.kernels.cuda import weights as device_weights
from llama_hpc.kernels.cuda.product_call import matmul, matvec, pack_weights
from llama_hpc.kernels.cuda.weights import lay_out
from llama_hpc.kernels.formats import Blocks


def numbers(*shape):
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def test_matmul_and_matvec(device):
    x, w = numbers(3, 300), numbers(40, 300)
    expected = reference.finish(reference.matmul(x, w, 256)[1])[1]
    out = np.empty((3, 40), np.float32)
    assert matmul(x, w, out, device) is out and out.tobytes() == expected.tobytes()
    assert matvec(x[1], w, device=device).tobytes() == expected[1].tobytes()
    packed = reference_quantize.quantize_q8(w, Blocks(300, 64))
    expected = reference.finish(reference.matmul(x, packed, 64)[1])[1]
    for given in (packed, lay_out(packed), pack_weights(w, "q8", 64, device)):
        assert matmul(x, given, device=device).tobytes() == expected.tobytes()
    assert matmul(x[:0], w, device=device).shape == (0, 40)


def test_what_is_wrong(device):
    with pytest.raises(ValueError, match="does not fit"):
        matmul(numbers(3, 30), numbers(40, 31), device=device)
    with pytest.raises(ValueError, match="not \\(2, 3\\) in q5"):
        pack_weights(numbers(2, 3), "q5", device=device)
    with pytest.raises(FloatingPointError):
        matmul(np.full((1, 32), np.nan, np.float32), numbers(2, 32), device=device)
    with pytest.raises(ValueError, match="up to 256"):
        lay_out(numbers(2, 600), Blocks(600, 512))
    packed = weights_of("q3_5", 4, 64, 256)
    packed.codebook[0] = 1
    with pytest.raises(ValueError, match="first pair"):
        lay_out(packed)


@pytest.mark.parametrize("weights_format", FORMATS)
def test_pieces_and_slabs(device, monkeypatch, weights_format):
    """Neither the pieces of an upload nor those of the layout change a byte."""
    packed = weights_of(weights_format, 150, 300, 256)
    whole = lay_out(packed, Blocks(300, 256))
    monkeypatch.setattr(device_weights, "_PIECE", 1 << 12)
    monkeypatch.setattr(device_weights, "_SLAB", 1)
    pieces = lay_out(packed, Blocks(300, 256))
    assert pieces.data.tobytes() == whole.data.tobytes()
    held = pieces.upload(device)
    assert device.download(held.data).tobytes() == whole.data.tobytes()
    assert held.tiles == 5 and held.data.nbytes == held.tiles * held.tile_bytes
