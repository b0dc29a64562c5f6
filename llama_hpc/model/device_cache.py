"""The KV cache of one stage on a GPU: pages of 16 positions in the memory of the device, page tables on both sides."""

import numpy as np

from llama_hpc.kernels.numerics import PAGE

WIDTH = 16                      # a row of the value pool is a multiple of so many numbers
# What the pools hold: float32, the bits of float16, or int8 with a float16 scale for each position and KV head.
DTYPES = {"f32": np.float32, "f16": np.uint16, "q8": np.int8}


class DeviceCache:
    """``count`` pages of keys and values for the layers of a stage, as ``kv_cache.KVCache`` has them on the host.

    The scheduler writes ``pages`` int32 [sequences, pages of a sequence]; ``update`` brings it to the device, where it is
    ``table``, behind the steps that were launched. Without ``count`` each sequence has pages of its own, and the table is final.
    Positions are not dealt out to several ranks.
    """

    parts = 1

    def __init__(self, device, layers: range, kv_heads: int, head_dim: int, sequences: int, max_seq_len: int, dtype,
                 count: int | None = None):
        per_sequence = -(-max_seq_len // PAGE)
        self.device, self.dtype, self.first_layer = device, np.dtype(dtype), layers.start
        self.first_parts = np.zeros(sequences, np.int32)
        self.pages = np.zeros((sequences, per_sequence), np.int32)
        if count is None:
            count = sequences * per_sequence
            self.pages[:] = np.arange(count, dtype=np.int32).reshape(self.pages.shape)
        self.own_count = count
        self.table, self._sent = device.upload(self.pages), self.pages.copy()
        width = -(-head_dim // WIDTH) * WIDTH
        self.keys = [device.zeros((count, kv_heads, head_dim, PAGE), dtype) for _ in layers]
        self.values = [device.zeros((count, kv_heads, PAGE, width), dtype) for _ in layers]
        scaled = layers if self.dtype == np.int8 else ()
        self.key_scales, self.value_scales = ([device.zeros((count, kv_heads, PAGE), np.uint16) for _ in scaled]
                                              for _ in range(2))

    def pools(self, layer: int) -> dict:
        """The pools of one of the stage's layers, by its number in the whole model, as the kernels name them."""
        pools = {"keys": self.keys, "values": self.values, "key_scales": self.key_scales, "value_scales": self.value_scales}
        return {name: layers[layer - self.first_layer] for name, layers in pools.items() if layers}

    def update(self, place: np.ndarray) -> None:
        """Begins to bring the page table to the device, if it has changed: from ``place``, pinned, which must stay as it is until
        it is there."""
        if not np.array_equal(self.pages, self._sent):
            np.copyto(self._sent, self.pages)
            np.copyto(place, self.pages)
            self.device.upload(place, self.table)

    def give_back(self, pages) -> None:
        """Memory of a device is not given back page by page."""

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values, *self.key_scales, *self.value_scales))
