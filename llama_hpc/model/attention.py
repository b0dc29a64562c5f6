"""Self-attention of one layer, parallel over query heads with the KV heads they use."""

import numpy as np

from llama_hpc.kernels.cpu import attention as kernel
from llama_hpc.kernels.cpu import elementwise
from llama_hpc.model.linear import ColumnParallelLinear, LinearWeights, RowParallelLinear


class AttentionWeights:
    """This rank's share: q, k, v, o as LinearWeights, and q_norm, k_norm (float32 [head_dim], or None)."""

    def __init__(self, q: LinearWeights, k: LinearWeights, v: LinearWeights, o: LinearWeights, q_norm=None, k_norm=None):
        self.q, self.k, self.v, self.o, self.q_norm, self.k_norm = q, k, v, o, q_norm, k_norm


class ParallelAttention:
    """Attention over the paged cache, from the normed input to the residual. Collective over the tensor group."""

    def __init__(self, layer: int, weights: AttentionWeights, buffers):
        self.layer, self.buffers, self.config = layer, buffers, buffers.config
        self.q_norm, self.k_norm = weights.q_norm, weights.k_norm
        self.window = self.config.window(layer)
        column, row = buffers.column_parallel, buffers.row_parallel
        self.q: ColumnParallelLinear = column("q", layer, weights.q)
        self.k: ColumnParallelLinear = column("k", layer, weights.k)
        self.v: ColumnParallelLinear = column("v", layer, weights.v)
        self.o: RowParallelLinear = row("o", layer, weights.o)
        self.scale = np.float32(1.0 / np.sqrt(np.float64(self.config.head_dim)))

    def forward(self, batch) -> None:
        """batch: the step's ``Batch``; reads buffers.normed, adds to buffers.residual."""
        b, rows, faults = self.buffers, batch.rows, self.buffers.faults
        self.q.forward(b.normed, b.q, rows)
        self.k.forward(b.normed, b.k, rows)
        self.v.forward(b.normed, b.v, rows)
        if self.q_norm is not None:
            self._head_norm(b.q, self.q_norm, rows, "q_norm")
            self._head_norm(b.k, self.k_norm, rows, "k_norm")
        elementwise.rope(b.q, b.cosines, b.sines, batch.positions, rows)
        elementwise.rope(b.k, b.cosines, b.sines, batch.positions, rows)
        keys, values = b.k, b.v
        if b.cache.dtype == np.uint16:
            keys, values = b.k_half, b.v_half
            faults.note(elementwise.to_half(b.k, keys, rows), "k", self.layer)
            faults.note(elementwise.to_half(b.v, values, rows), "v", self.layer)
        key_pool, value_pool = b.cache.pools(self.layer)
        kernel.store(keys, values, key_pool, value_pool, b.cache.pages, batch.sequences, batch.positions, rows)
        status = kernel.attention(b.q, key_pool, value_pool, b.cache.pages, batch.sequences, batch.positions, b.kv_of_head,
                                  self.window, self.scale, b.attended.values, b.attention_work, rows)
        faults.note(status, "attention", self.layer)
        faults.note(b.attended.prepare(rows), "attention", self.layer)
        self.o.forward(b.attended, b.residual, rows)

    def _head_norm(self, x: np.ndarray, weight: np.ndarray, rows: int, name: str) -> None:
        """RMS norm of every head, before RoPE (Qwen3)."""
        heads = x.reshape(-1, self.config.head_dim)
        count = rows * (x.shape[1] // self.config.head_dim)
        self.buffers.faults.note(elementwise.rms_norm(heads, weight, self.config.norm_eps, heads, count), name, self.layer)
