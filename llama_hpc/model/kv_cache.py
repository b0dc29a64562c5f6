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
    """``count`` pages of keys and values for the layers of one stage, and which of them each sequence uses: up to
    ``sequences`` of them, of up to ``max_seq_len`` positions.

    Pools are uint16 (float16 bits) or float32; memory is touched as positions are written. Position p of sequence s lies on page
    ``pages[s, p // PAGE]``, in every layer. Without ``count`` each sequence has pages of its own, and the table is final.
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

    def pools(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Key and value pool of one of the stage's layers, by its number in the whole model."""
        return self.keys[layer - self.first_layer], self.values[layer - self.first_layer]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))
