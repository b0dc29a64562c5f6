"""Self-attention of one layer, parallel over query heads with the KV heads they use."""

import numpy as np

from llama_hpc.kernels.cpu import attention as kernel
from llama_hpc.kernels.cpu import kv_store
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.workers import ONE_TASK, WorkDistribution
from llama_hpc.model.linear import ColumnParallelLinear, LinearWeights, RowParallelLinear
from llama_hpc.model.steps import Steps

_OPERATIONS = {np.dtype(np.uint16): kernel.attention_operation, np.dtype(np.float32): kernel.float32_attention_operation,
               np.dtype(np.int8): kernel.int8_attention_operation}


class AttentionWeights:
    """This rank's share: q, k, v, o as LinearWeights, and q_norm, k_norm (float32 [head_dim], or None)."""

    def __init__(self, q: LinearWeights, k: LinearWeights, v: LinearWeights, o: LinearWeights, q_norm=None, k_norm=None):
        self.q, self.k, self.v, self.o, self.q_norm, self.k_norm = q, k, v, o, q_norm, k_norm


class ParallelAttention:
    """Attention over the paged cache, from the normed input to the residual. Collective over the tensor group."""

    def __init__(self, layer: int, weights: AttentionWeights, buffers):
        self.layer, self.weights, self.buffers = layer, weights, buffers
        self.qkv = ColumnParallelLinear(layer, {"q": weights.q, "k": weights.k, "v": weights.v})
        self.o = RowParallelLinear("o", layer, weights.o)

    def add(self, steps: Steps, normed: Activation) -> None:
        """Reads ``normed``, adds to buffers.residual: one product, rotation and store, attention, one product."""
        b, config, weights = self.buffers, self.buffers.config, self.weights
        self.qkv.add(steps, normed, {"q": b.q, "k": b.k, "v": b.v})
        pages, threads = b.cache.pages, steps.pool.threads
        shared = {"q": b.q, "q_stride": b.q.shape[1], "pages": pages, "pages_stride": pages.shape[1], "sequences": b.sequences,
                  "positions": b.positions, "kv_heads": b.kv_heads, "head_dim": config.head_dim, **b.cache.pools(self.layer)}
        placing = {} if b.context is None else b.context.placing()
        norms = ("q_norm", "k_norm") if weights.q_norm is not None else ()
        steps.program.add((self.layer, norms or ("k",)), kv_store.store_operation, kv_store.STORE, ONE_TASK.record(threads),
                          rows=steps.rows, k=b.k, v=b.v, k_stride=b.k.shape[1], v_stride=b.v.shape[1], cosines=b.cosines,
                          sines=b.sines, heads=b.heads, q_norm=weights.q_norm, k_norm=weights.k_norm, eps=b.eps,
                          half=int(b.cache.dtype == np.uint16), **placing, **shared)
        if b.context is not None:
            b.context.add(steps, self.layer, b)
        else:
            work = WorkDistribution.for_attention(b.kv_heads, 256, steps.schedule)
            steps.program.add((self.layer, ("attention",)), _OPERATIONS[b.cache.dtype], kernel.ATTENTION, work.record(threads),
                              runs=b.runs, run_count=steps.runs, head_starts=b.head_starts, window=config.window(self.layer),
                              scale=b.scale, target=b.attended.record, scratch=0, keep=(b.attended,), **shared)
        self.o.add(steps, b.attended, b.residual, b.sums[0])
