"""The KV cache of one stage and tensor rank: pages of 16 positions, a page table for every sequence."""

import numpy as np

from llama_hpc.kernels.cpu.attention import padded_head_dim
from llama_hpc.kernels.numerics import PAGE


def pages_of(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


def bytes_per_position(head_dim: int, kv_heads: int, layers: int, dtype) -> int:
    """Bytes that one position takes in the pools of so many layers."""
    return (head_dim + padded_head_dim(head_dim)) * kv_heads * layers * np.dtype(dtype).itemsize


class KVCache:
    """Keys and values of ``sequences`` sequences of up to ``max_seq_len`` positions, for the layers of one stage.

    Pools are uint16 (float16 bits) or float32; memory is touched as positions are written. Sequence s owns the pages
    ``pages[s]``; the same table serves every layer.
    """

    def __init__(self, layers: range, kv_heads: int, head_dim: int, sequences: int, max_seq_len: int, dtype):
        per_sequence = pages_of(max_seq_len)
        count = sequences * per_sequence
        self.dtype = np.dtype(dtype)
        self.first_layer = layers.start
        self.pages = np.arange(count, dtype=np.int32).reshape(sequences, per_sequence)
        self.keys = [np.empty((count, kv_heads, head_dim, PAGE), dtype) for _ in layers]
        self.values = [np.empty((count, kv_heads, PAGE, padded_head_dim(head_dim)), dtype) for _ in layers]

    def pools(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Key and value pool of one of the stage's layers, by its number in the whole model."""
        return self.keys[layer - self.first_layer], self.values[layer - self.first_layer]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))
