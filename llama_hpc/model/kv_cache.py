"""The KV cache of one stage and tensor rank: pages of 16 positions, a page table for every sequence."""

import numpy as np

from llama_hpc.kernels.cpu.kv_store import padded_head_dim
from llama_hpc.kernels.numerics import PAGE

# What the pools hold: float32, the bits of float16, or int8 with a float16 scale for each position and KV head.
DTYPES = {"f32": np.float32, "f16": np.uint16, "q8": np.int8}


def cache_format(kv_cache: str, weights_format: str) -> str:
    """One of ``DTYPES`` for the option --kv-cache: with ``auto`` float32 for f32 weights, else float16."""
    if kv_cache == "auto":
        return "f32" if weights_format == "f32" else "f16"
    return kv_cache


def pages_of(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


def bytes_per_position(head_dim: int, kv_heads: int, layers: int, dtype) -> int:
    """Bytes that one position takes in the pools of so many layers."""
    scales = 2 * 2 if np.dtype(dtype) == np.int8 else 0
    return ((head_dim + padded_head_dim(head_dim)) * np.dtype(dtype).itemsize + scales) * kv_heads * layers


class KVCache:
    """``count`` pages of keys and values for the layers of one stage, and which of them each sequence uses: up to
    ``sequences`` of them, of up to ``max_seq_len`` positions.

    Pools are uint16 (float16 bits), float32, or int8 with scales beside them; memory is touched as positions are written.
    Position p of sequence s lies on page ``pages[s, p // PAGE]``, in every layer. Without ``count`` each sequence has pages of
    its own, and the table is final.
    """

    def __init__(self, layers: range, kv_heads: int, head_dim: int, sequences: int, max_seq_len: int, dtype,
                 count: int | None = None):
        per_sequence = pages_of(max_seq_len)
        self.dtype = np.dtype(dtype)
        self.first_layer = layers.start
        if count is None:
            count = sequences * per_sequence
            self.pages = np.arange(count, dtype=np.int32).reshape(sequences, per_sequence)
        else:
            self.pages = np.zeros((sequences, per_sequence), np.int32)
        self.keys = [np.empty((count, kv_heads, head_dim, PAGE), dtype) for _ in layers]
        self.values = [np.empty((count, kv_heads, PAGE, padded_head_dim(head_dim)), dtype) for _ in layers]
        scaled = layers if self.dtype == np.int8 else ()
        self.key_scales, self.value_scales = ([np.empty((count, kv_heads, PAGE), np.uint16) for _ in scaled] for _ in range(2))

    def pools(self, layer: int) -> dict[str, np.ndarray]:
        """The pools of one of the stage's layers, by its number in the whole model, as the kernels name them."""
        pools = {"keys": self.keys, "values": self.values, "key_scales": self.key_scales, "value_scales": self.value_scales}
        return {name: layers[layer - self.first_layer] for name, layers in pools.items() if layers}

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values, *self.key_scales, *self.value_scales))
