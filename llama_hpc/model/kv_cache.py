"""The KV cache of one stage and tensor rank: pages of 16 positions, a page table for every sequence.

With context parallelism the ranks of a group are its parts: of a sequence, the attention blocks of 256 positions lie in one part
after the other, in turn. Pages are numbered over all parts; page p lies in part p % parts, and is the page p // parts of it.
"""

from collections.abc import Iterable

import numpy as np

from llama_hpc.kernels.attention_inputs import padded_head_dim
from llama_hpc.kernels.cpu.memory import give_back
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, PAGE

# What the pools hold: float32, the bits of float16, or int8 with a float16 scale for each position and KV head.
DTYPES = {"f32": np.float32, "f16": np.uint16, "q8": np.int8}


BLOCK_PAGES = ATTENTION_BLOCK // PAGE


def cache_format(kv_cache: str, weights_format: str) -> str:
    """One of ``DTYPES`` for the option --kv-cache: with ``auto`` float32 for f32 weights, else float16."""
    if kv_cache == "auto":
        return "f32" if weights_format == "f32" else "f16"
    return kv_cache


def pages_of(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


def pages_by_part(first: int, stop: int, parts: int, first_part: int = 0) -> list[int]:
    """How many of a sequence's pages first … stop - 1 lie in each part, where its first block lies in ``first_part``."""
    if parts == 1:
        return [max(0, stop - first)]
    counts = [0] * parts
    for block in range(first // BLOCK_PAGES, -(-stop // BLOCK_PAGES)):
        counts[(block + first_part) % parts] += max(0, min(stop, (block + 1) * BLOCK_PAGES) - max(first, block * BLOCK_PAGES))
    return counts


def pages_in_a_part(positions: int, parts: int) -> int:
    """Pages of the part that holds most of a sequence of so many positions."""
    return max(pages_by_part(0, pages_of(positions), parts))


def longest_text(pages: int, parts: int) -> int:
    """Positions of the longest sequence that a cache of so many pages holds alone."""
    whole, rest = divmod(pages // parts, BLOCK_PAGES)
    return whole * parts * ATTENTION_BLOCK + rest * PAGE


def bytes_per_position(head_dim: int, kv_heads: int, layers: int, dtype) -> int:
    """Bytes that one position takes in the pools of so many layers."""
    scales = 2 * 2 if np.dtype(dtype) == np.int8 else 0
    return ((head_dim + padded_head_dim(head_dim)) * np.dtype(dtype).itemsize + scales) * kv_heads * layers


class KVCache:
    """``count`` pages of keys and values for the layers of one stage, and which of them each sequence uses: up to
    ``sequences`` of them, of up to ``max_seq_len`` positions. This is one of ``parts`` parts, which hold as many pages each.

    Pools are uint16 (float16 bits), float32, or int8 with scales beside them; memory is touched as positions are written.
    Position p of sequence s lies on page ``pages[s, p // PAGE]`` of its part, in every layer; ``first_parts[s]`` is the part of
    the first block. Without ``count`` each sequence has pages of its own, and the table is final.
    """

    def __init__(self, layers: range, kv_heads: int, head_dim: int, sequences: int, max_seq_len: int, dtype,
                 count: int | None = None, parts: int = 1):
        per_sequence = pages_of(max_seq_len)
        self.dtype, self.parts = np.dtype(dtype), parts
        self.first_layer = layers.start
        self.first_parts = np.zeros(sequences, np.int32)
        self.pages = np.zeros((sequences, per_sequence), np.int32)
        if count is None:
            own = pages_in_a_part(max_seq_len, parts)
            count, numbers = sequences * own * parts, np.arange(per_sequence)
            self.pages[:] = numbers // BLOCK_PAGES // parts * BLOCK_PAGES + numbers % BLOCK_PAGES
            self.pages += np.arange(sequences, dtype=np.int32)[:, None] * own
        count = self.own_count = count // parts
        self.keys = [np.empty((count, kv_heads, head_dim, PAGE), dtype) for _ in layers]
        self.values = [np.empty((count, kv_heads, PAGE, padded_head_dim(head_dim)), dtype) for _ in layers]
        scaled = layers if self.dtype == np.int8 else ()
        self.key_scales, self.value_scales = ([np.empty((count, kv_heads, PAGE), np.uint16) for _ in scaled] for _ in range(2))

    def pools(self, layer: int) -> dict[str, np.ndarray]:
        """The pools of one of the stage's layers, by its number in the whole model, as the kernels name them."""
        pools = {"keys": self.keys, "values": self.values, "key_scales": self.key_scales, "value_scales": self.value_scales}
        return {name: layers[layer - self.first_layer] for name, layers in pools.items() if layers}

    def give_back(self, pages: Iterable[int]) -> None:
        """Returns the memory of pages of this part, whose content nobody needs, to the system."""
        runs: list[list[int]] = []
        for page in sorted(pages):
            if runs and runs[-1][1] == page:
                runs[-1][1] += 1
            else:
                runs.append([page, page + 1])
        for pool in self._pools:
            for first, stop in runs:
                give_back(pool[first:stop])

    @property
    def _pools(self) -> list[np.ndarray]:
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools)
