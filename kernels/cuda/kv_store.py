"""Norm and rotation of queries and keys, and keys and values into the pages of the cache. See kv_store.cu."""

import numpy as np

_WARPS = 4                      # of a block; each takes a row and head
_KERNELS = {np.dtype(np.uint16): "store_half", np.dtype(np.float32): "store_float", np.dtype(np.int8): "store_int8"}


def rotate_and_store(device, q, k, v, cosines, sines, sequences, positions, pages, keys, values, heads: int, kv_heads: int,
                     head_dim: int, rows, most: int, status, q_norm=None, k_norm=None, eps: float = 0.0, key_scales=None,
                     value_scales=None) -> None:
    """Norms (if there are weights float32 [head_dim]) and rotates q and k, float32 [rows, heads * head_dim], in place, and stores
    k and v at the ``positions`` int32 [rows] of ``sequences`` int32 [rows].

    cosines, sines: float32 [positions, head_dim / 2]; ``pages`` int32 [sequences, most pages]; pools as in ``cpu.kv_store``, int8
    ones with their scales. ``rows``: int32 [1], at most ``most``. ``status``: int32 [1], which takes NOT_FINITE and OUT_OF_RANGE.
    """
    tasks = most * (heads + kv_heads)
    device.launch("kv_store.cu", _KERNELS[np.dtype(keys.dtype)], (-(-tasks // _WARPS),), (32 * _WARPS,), q, k, v, cosines, sines,
                  sequences, positions, pages, pages.shape[1], heads, kv_heads, head_dim, q_norm, k_norm, np.float64(eps), keys,
                  values, key_scales, value_scales, rows, status)
