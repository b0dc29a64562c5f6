"""Products called on their own on a GPU, with nothing prepared: the GPU form of ``cpu.calls.matmul`` and ``matvec``."""

import numpy as np

from .. import reference_quantize
from ..formats import Blocks, Packed
from ..numerics import BLOCK
from .activations import Activation, quantize_rows
from .attention_call import _first_device
from .products import FLOAT, Part, Scratch, product
from .weights import DeviceWeights, HostWeights, lay_out

_FORMATS = ("f32", "f16", "q8", "q4")


def pack_weights(weights: np.ndarray | Packed | HostWeights | DeviceWeights, weights_format: str = "f32", block: int = BLOCK,
                 device=None) -> DeviceWeights:
    """float32 weights [outputs, inputs] as a device holds them, in ``f32``, ``f16``, ``q8`` or ``q4``; packed ones as they are.

    ``block``: inputs of a reduction block. ``device``: a ``Device``, the first one if not told. Raises ValueError for another
    format or shape, and values that the format cannot hold.
    """
    if isinstance(weights, DeviceWeights):
        return weights
    device = device or _first_device()
    if isinstance(weights, HostWeights):
        return weights.upload(device)
    if isinstance(weights, Packed):
        return lay_out(weights).upload(device)
    plain = np.ascontiguousarray(weights, np.float32)
    if plain.ndim != 2 or weights_format not in _FORMATS:
        raise ValueError(f"weights [outputs, inputs] in {', '.join(_FORMATS)} are needed, not {plain.shape} in {weights_format}")
    blocks = Blocks(plain.shape[1], block)
    if weights_format == "f16":
        plain = reference_quantize.quantize_f16(plain)
    elif weights_format != "f32":
        plain = {"q8": reference_quantize.quantize_q8, "q4": reference_quantize.quantize_q4}[weights_format](plain, blocks)
    return lay_out(plain, blocks).upload(device)


def matmul(x: np.ndarray, weights: np.ndarray | Packed | HostWeights | DeviceWeights, out: np.ndarray | None = None,
           device=None) -> np.ndarray:
    """x Wᵀ, float32 [M, N], of float32 x [M, K] and W [N, K], packed or not (see ``pack_weights``).

    Raises FloatingPointError for values that are not finite or out of range.
    """
    device = device or _first_device()
    x, held = np.ascontiguousarray(x, np.float32), pack_weights(weights, device=device)
    if x.ndim != 2 or x.shape[1] != held.blocks.size or (out is not None and out.shape != (len(x), held.rows)):
        raise ValueError(f"x of shape {x.shape} or the result does not fit weights [{held.rows}, {held.blocks.size}]")
    out = np.empty((len(x), held.rows), np.float32) if out is None else out
    if not out.size:
        return out
    activation = Activation(device, len(x), x.shape[1], held.blocks.block, held.quantized)
    device.upload(x, activation.values)
    rows, status = (device.upload(np.array([value], np.int32)) for value in (len(x), 0))
    if held.quantized:
        quantize_rows(device, activation, rows, len(x), status)
    y = device.zeros(out.shape, np.float32)
    product(device, activation, [Part(held, y)], rows, len(x), FLOAT, status, scratch=Scratch(device, held.rows))
    if device.download(status)[0]:
        raise FloatingPointError(f"the product of {x.shape} activations is not finite, or beyond the range of exact sums")
    out[:] = device.download(y)
    return out


def matvec(x: np.ndarray, weights: np.ndarray | Packed | HostWeights | DeviceWeights, out: np.ndarray | None = None,
           device=None) -> np.ndarray:
    """W x, float32 [N], of float32 x [K]. Raises as ``matmul``."""
    return matmul(x[None], weights, None if out is None else out[None], device)[0]
