"""Attention called on its own on a GPU, with nothing prepared: the GPU form of ``cpu.calls.attention``."""

from functools import cache

import numpy as np

from .. import attention_inputs as inputs
from ..numerics import BLOCK
from .activations import Activation
from .attention import Scratch, most_blocks
from .attention import attention as paged
from .device import Device


@cache
def _first_device() -> Device:
    return Device()


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, window: int = 0, scale: float | None = None,
              device=None) -> np.ndarray:
    """softmax(q kᵀ scale) v, float32 [rows, heads, head_dim], with the bits of a model's attention over the same keys and values.

    q [rows, heads, head_dim] are the last ``rows`` positions of k and v [positions, kv_heads, head_dim]; consecutive query heads
    share a KV head. ``causal``: a row sees the positions up to its own, of these the last ``window`` (0: all), else each row sees
    all. ``scale``: by default head_dim**-0.5. k and v in float16 are read as such, anything else as float32. ``device``: a
    ``Device``, the first one if not told.

    Raises ValueError for shapes that do not fit, FloatingPointError for values that are not finite or out of range.
    """
    inputs.check(q, k, v, causal, window)
    (rows, heads, head_dim), (positions, kv_heads, _) = q.shape, k.shape
    if not rows:
        return np.empty(q.shape, np.float32)
    device = device or _first_device()
    share, blocks = heads // kv_heads, most_blocks(positions, window)
    scratch = Scratch(device, rows, blocks, heads, head_dim, share)
    target = Activation(device, rows, heads * head_dim, min(head_dim, BLOCK), False)
    keys, values = (device.upload(x.view(np.uint16) if x.dtype == np.float16 else x) for x in inputs.in_pages(k, v))
    integers = (np.arange(len(keys))[None], np.zeros(rows), inputs.positions_of(q, k, causal), np.arange(0, heads + 1, share),
                [rows], [0])
    table, slots, where, starts, count, status = (device.upload(np.asarray(x, np.int32)) for x in integers)
    flat = device.upload(np.ascontiguousarray(q, np.float32).reshape(rows, heads * head_dim))
    paged(device, flat, keys, values, table, slots, where, starts, kv_heads, head_dim, window,
          inputs.default_scale(head_dim) if scale is None else scale, target, count, rows, positions, scratch, status)
    if device.download(status)[0]:
        raise FloatingPointError("attention: a value is not finite, or beyond the range of exact sums")
    return device.download(target.values).reshape(q.shape)
