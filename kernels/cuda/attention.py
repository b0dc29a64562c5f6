"""Attention over a paged KV cache on a device. See attention.cuh, and ``cpu.attention`` for what is computed.

Pools: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads, 16, head_dim rounded up to 16]; float16 bits (uint16),
float32, or int8 with float16 scales [pages, kv_heads, 16] in uint16.
"""

import numpy as np

from ..attention_inputs import padded_head_dim
from ..numerics import ATTENTION_BLOCK, BLOCK, PAGE
from .activations import Activation

_DECODE_THREADS, _PREFILL_THREADS, _THREADS = 128, 256, 256
_RING_BYTES = 3 * 16 * (64 + 4) * 16        # the stages of attention_decode.cu
_MOST_TILE = 16                             # query heads of a KV head that it takes together
_QUERIES = 64                               # a tile of attention_prefill.cu: rows x query heads of a KV head
_SCORE_BYTES = 4 * _QUERIES * (ATTENTION_BLOCK + 4)
_STAGE_BYTES = 4 * 16 * (ATTENTION_BLOCK + 4 + _QUERIES + 4)
_WORK_BYTES = 4 << 10                       # what it declares itself, at most
_TURNS = 64                                 # rows of a grid that takes rows in turn
_KINDS = {np.dtype(np.uint16): "half", np.dtype(np.float32): "float", np.dtype(np.int8): "int8"}


def most_blocks(most_positions: int, window: int) -> int:
    """How many attention blocks a row may see at most, of a sequence of ``most_positions``."""
    blocks = -(-most_positions // ATTENTION_BLOCK)
    return min(blocks, (window + ATTENTION_BLOCK - 2) // ATTENTION_BLOCK + 1) if window else blocks


class Scratch:
    """What attention blocks leave for their merge: float32 maxima and sums [rows, heads, blocks], chains [.., width].

    ``rows`` are taken at a time, ``blocks`` are what a row sees at most, ``heads`` all query heads, of which at most ``share``
    read one KV head (all, if not told). All layers may use the same.
    """

    def __init__(self, device, rows: int, blocks: int, heads: int, head_dim: int, share: int | None = None):
        if not 0 < head_dim <= BLOCK or head_dim % 2:
            raise ValueError(f"heads of an even number of up to {BLOCK} columns are supported, not {head_dim}")
        self.rows, self.blocks, self.heads, self.head_dim, self.share = rows, blocks, heads, head_dim, max(share or heads, 1)
        self.maxima, self.sums = (device.zeros((rows, heads, blocks), np.float32) for _ in range(2))
        self.chains = device.zeros((rows, heads, blocks, padded_head_dim(head_dim)), np.float32)
        # The plan of a step: first rows of tiles, the first item of each, rows that are in no tile, and how many there are.
        sizes = rows + 1, rows + 1, rows, 3
        self.tiles, self.items, self.alone, self.counts = (device.zeros(size, np.int32) for size in sizes)

    @property
    def nbytes(self) -> int:
        return self.maxima.nbytes + self.sums.nbytes + self.chains.nbytes


def attention(device, q, keys, values, pages, sequences, positions, head_starts, kv_heads: int, head_dim: int, window: int,
              scale: float, target: Activation, rows, most: int, most_positions: int, scratch: Scratch, status,
              key_scales=None, value_scales=None, longest: int | None = None) -> None:
    """target = softmax(q keys * scale) values over the positions visible to each row, quantised if the target is.

    q: float32 [rows, heads * head_dim]; ``pages`` int32 [sequences, most pages]; ``sequences``, ``positions`` int32 [most];
    ``head_starts`` int32 [kv_heads + 1]: the first query head of each KV head; ``window``: positions that a row sees, 0 for all.
    ``rows``: int32 [1], at most ``most``; no position is beyond ``most_positions`` - 1. ``longest``: how many rows may be
    consecutive positions of one sequence (1 where each row is another sequence); ``most`` if not told. ``status``: int32 [1],
    which takes OUT_OF_RANGE and NOT_FINITE.
    """
    blocks = most_blocks(most_positions, window)
    if blocks > scratch.blocks or head_dim != scratch.head_dim:
        raise ValueError(f"a scratch for {scratch.blocks} blocks of heads of {scratch.head_dim} is too small for {blocks} of "
                         f"{head_dim}")
    if target.quantized and target.blocks.block != head_dim:
        raise ValueError(f"attention is quantised by heads of {head_dim}, not by blocks of {target.blocks.block}")
    kind, tile_rows, stages = _KINDS[np.dtype(keys.dtype)], _QUERIES // scratch.share, _stages(device)
    # A tile costs as much as some half of its rows do one by one.
    least = max(2, -(-tile_rows // 2))
    for first in range(0, most, scratch.rows):
        now = min(scratch.rows, most - first)
        operation = (q, q.strides[0] // 4, keys, values, key_scales, value_scales, pages, pages.shape[1], sequences, positions,
                     rows, first, head_starts, kv_heads, head_dim, window, float(scale), scratch.heads, scratch.blocks,
                     scratch.maxima, scratch.sums, scratch.chains)
        tiles = stages > 0 and tile_rows >= least and min(now, longest or most) >= least
        if tiles:
            device.launch("attention_plan.cu", "plan_tiles", (1,), (_THREADS,), sequences, positions, rows, first, now, window,
                          kv_heads, tile_rows, least, scratch.tiles, scratch.items, scratch.alone, scratch.counts)
            grid = min(stages * device.multiprocessors, blocks * kv_heads * (now // least)),
            device.launch("attention_prefill.cu", f"prefill_{kind}", grid, (_PREFILL_THREADS,), *operation, scratch.tiles,
                          scratch.items, scratch.counts, stages, shared=_SCORE_BYTES + stages * _STAGE_BYTES)
        _decode(device, kind, operation, (blocks, kv_heads, now), scratch, tiles)
        device.launch("attention_merge.cu", "merge_blocks", (scratch.heads, now), (_THREADS,), scratch.maxima, scratch.sums,
                      scratch.chains, positions, rows, first, head_dim, window, scratch.blocks, target.values, target.x,
                      target.scales, status, shared=4 * blocks)


def _stages(device) -> int:
    """Stages of attention_prefill.cu that fit a multiprocessor's shared memory: two, with two blocks at a time; one; or none."""
    return next((stages for stages in (2, 1) if _SCORE_BYTES + stages * _STAGE_BYTES + _WORK_BYTES <= device.shared_bytes), 0)


def _decode(device, kind: str, operation: tuple, grid: tuple[int, int, int], scratch: Scratch, planned: bool) -> None:
    """Row by row: all rows, or those that a plan leaves."""
    blocks, kv_heads, rows = grid
    tile = min(1 << (scratch.share - 1).bit_length(), _MOST_TILE)
    a_head = 4 * (ATTENTION_BLOCK + BLOCK)
    others = _RING_BYTES + 4 * (ATTENTION_BLOCK + ATTENTION_BLOCK // PAGE)
    while tile * a_head + others > device.shared_bytes:
        tile //= 2
    device.launch("attention_decode.cu", f"decode_{kind}",
                  (blocks, kv_heads * -(-scratch.share // tile), min(rows, _TURNS) if planned else rows), (_DECODE_THREADS,),
                  *operation, scratch.alone if planned else None, scratch.counts if planned else None, tile,
                  shared=tile * a_head + others)
