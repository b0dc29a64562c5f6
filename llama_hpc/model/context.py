"""Context parallelism: tensor ranks of a group deal out the positions of the KV cache, attention block by attention block.

As in vLLM's decode context parallelism, but exact, and for prompts too. All ranks of a group hold the same KV heads and work on
the query heads of all: queries are exchanged, then maxima of scores, then fixed-point sums (see ``context_attention``).
"""

import numpy as np

from llama_hpc.comm.reduce import Region, TensorReducer
from llama_hpc.kernels.attention_inputs import padded_head_dim
from llama_hpc.kernels.cpu import context_attention as kernel
from llama_hpc.kernels.cpu import joining
from llama_hpc.kernels.cpu.memory import aligned
from llama_hpc.kernels.cpu.workers import ONE_TASK, WorkDistribution
from llama_hpc.model.kv_cache import BLOCK_PAGES, KVCache
from llama_hpc.model.shares import TensorShare
from llama_hpc.model.steps import Steps

NO_CONTEXT = {"context_parallel": 1, "context_joins": 0, "context_bytes": 0, "context_seconds": 0.0}
_OPERATIONS = {np.dtype(np.uint16): kernel.context_operation, np.dtype(np.float32): kernel.float32_context_operation,
               np.dtype(np.int8): kernel.int8_context_operation}


def shared_bytes(head_dim: int, share: TensorShare) -> int:
    """Bytes for each row of a step that a rank exchanges in its group."""
    return len(share.group_heads) * (4 * head_dim + 8 + 8 * (head_dim + 1)) if share.context > 1 else 0


class ContextGroup:
    """What one rank of a group needs for attention, in all layers of a stage. Making one is collective over the group.

    ``reducer`` joins over the group, in which the rank is number ``share.context_index``.
    """

    def __init__(self, head_dim: int, share: TensorShare, cache: KVCache, reducer: TensorReducer, max_rows: int):
        self.reducer, self.share, self.cache, self.head_dim = reducer, share, cache, head_dim
        heads = self.heads = len(share.group_heads)
        self.first = share.query_heads.start - share.group_heads.start
        self.queries = aligned((max_rows, heads * head_dim), np.float32)
        self._queries = reducer.region(self.queries)
        self._maxima = reducer.region(aligned((max_rows, heads), np.int64))
        self._sums = reducer.region(aligned((max_rows, heads * (head_dim + 1)), np.int64))
        # A row and a block, over and over: enough for one row of every sequence that the cache can hold.
        self._room = -(-cache.own_count // BLOCK_PAGES) + len(cache.pages)
        self._kept = aligned((self._room, heads, 2 + padded_head_dim(head_dim)), np.float32)
        self._kept_at = np.zeros(max_rows, np.int64)

    def load(self, runs: np.ndarray, count: int, sequences: np.ndarray, positions: np.ndarray) -> None:
        """Deals out room for what a step keeps between its two passes over the cache."""
        share = self.share
        kernel.keep(runs, count, sequences, positions, self.cache.first_parts, share.context, share.context_index, self._room,
                    self._kept_at)

    def placing(self) -> dict:
        """Which positions this rank keeps, as operations want it."""
        return {"ranks": self.share.context, "rank": self.share.context_index, "first_parts": self.cache.first_parts}

    def add(self, steps: Steps, layer: int, buffers) -> None:
        """Appends attention of the rotated queries ``buffers.q`` [rows, own heads * head_dim] into ``buffers.attended``."""
        b, reducer, name, threads = buffers, self.reducer, (layer, ("attention",)), steps.pool.threads
        one = ONE_TASK.record(threads)
        work = WorkDistribution.for_attention(b.kv_heads, 256, steps.schedule).record(threads)
        steps.program.add((0, ()), kernel.place_operation, kernel.PLACE, one, rows=steps.rows, q=b.q, columns=b.q.shape[1],
                          out=self._queries.own, width=self.queries.shape[1], first=self.first * self.head_dim)
        steps.join(self._queries, joining.BITS, steps.rows, self.queries, reducer=reducer)
        fields = {"runs": b.runs, "run_count": steps.runs, "q": self.queries, "pages": b.cache.pages,
                  "pages_stride": b.cache.pages.shape[1], "sequences": b.sequences, "positions": b.positions,
                  "head_starts": b.head_starts, "kv_heads": b.kv_heads, "heads": self.heads, "head_dim": self.head_dim,
                  "window": b.config.window(layer), "scale": b.scale, "scratch": 0, "kept": self._kept, "kept_at": self._kept_at,
                  **b.cache.pools(layer), **self.placing()}
        operation = _OPERATIONS[b.cache.dtype]
        steps.program.add((0, ()), operation, kernel.CONTEXT, work, weighs=0, maxima=self._maxima.own, **fields)
        steps.bring_together(self._maxima, joining.MAXIMUM, steps.rows, reducer)
        steps.program.add(name, operation, kernel.CONTEXT, work, weighs=1, sums=self._sums.own, **_parts(self._maxima), **fields)
        steps.bring_together(self._sums, joining.SUM, steps.rows, reducer)
        steps.program.add(name, kernel.finish_operation, kernel.FINISH, one, rows=steps.rows, heads=b.heads, first=self.first,
                          all_heads=self.heads, head_dim=self.head_dim, target=b.attended.record, keep=(b.attended,),
                          **_parts(self._sums))

    def work(self) -> dict[str, int | float]:
        """What was exchanged: joins, bytes that this rank gave to them, and seconds."""
        reducer = self.reducer
        return {"context_parallel": self.share.context, "context_joins": reducer.calls, "context_bytes": reducer.bytes,
                "context_seconds": float(reducer.nanoseconds[0]) / 1e9}


def _parts(region: Region) -> dict:
    """What is left to join of a region, as operations want it."""
    return {"parts": region.parts, "part_count": len(region.parts)}
