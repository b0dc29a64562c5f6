"""Attention with positions dealt out to ranks: the bits of one rank that has them all, whoever holds what."""

import numpy as np
import pytest
from kernel_inputs import assert_same
from kv_caches import DTYPES, Cache, operate, pool, queries

from llama_hpc.kernels.cpu import attention, kv_store
from llama_hpc.kernels.cpu import context_attention as context
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, OK, OUT_OF_RANGE, PAGE

KV_OF_HEAD = 0, 0, 1, 1, 1
SEQUENCES = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
POSITIONS = [0, 15, 16, 255, 256, 257, 300, 511, 512, 513, 514, 515, 1299]
LENGTHS = 1, 17, 258, 1300
OPERATIONS = {"u": context.context_operation, "f": context.float32_context_operation, "i": context.int8_context_operation}
ALL, NOTHING = 1 << 20, 0


class Rank:
    """What one of ``ranks`` holds of a cache: the pages of its own blocks; what the table says of others leads to NaN."""

    def __init__(self, cache, first_parts, ranks, rank):
        self.cache, self.ranks, self.rank = cache, ranks, rank
        self.first_parts = np.array(first_parts, np.int32)
        blocks = np.arange(cache.pages.shape[1]) * PAGE // ATTENTION_BLOCK
        own = (blocks + self.first_parts[:, None]) % ranks == rank
        self.pages = np.where(own, np.cumsum(own.ravel()).reshape(own.shape), 0).astype(np.int32)
        def held(pool):
            if pool is None:
                return None
            part = np.full((own.sum() + 1, *pool.shape[1:]), {1: -128, 2: 0x7E00, 4: np.nan}[pool.itemsize], pool.dtype)
            part[self.pages[own]] = pool[cache.pages[own]]
            return part
        self.pools = {"keys": held(cache.key_pool), "values": held(cache.value_pool), "key_scales": held(cache.scale_pools[0]),
                      "value_scales": held(cache.scale_pools[1])}

    def run(self, q, sequences, positions, kv_of_head, window, room, threads, **fields):
        """One of the two operations; returns its status."""
        cache, rows, head_dim = self.cache, len(q), self.cache.head_dim
        runs, kept_at = np.zeros((rows, 2), np.int32), np.zeros(rows, np.int64)
        count = attention.runs_of(sequences, positions, rows, runs)
        context.keep(runs, count, sequences, positions, self.first_parts, self.ranks, self.rank, room, kept_at)
        pool(threads).need_scratch(128 + attention.scratch_bytes(self.pages.shape[1] * PAGE, head_dim,
                                                                 max(np.bincount(kv_of_head))))
        kv_heads = self.pools["keys"].shape[1]
        return operate(
            threads, OPERATIONS[cache.dtype.kind], context.CONTEXT, runs=runs, run_count=np.array([count]), q=q,
            pages=self.pages, pages_stride=self.pages.shape[1], sequences=sequences, positions=positions,
            head_starts=np.searchsorted(kv_of_head, range(kv_heads + 1)).astype(np.int32), kv_heads=kv_heads,
            heads=len(kv_of_head), head_dim=head_dim, window=window, scale=np.array([head_dim**-0.5], np.float32), scratch=128,
            ranks=self.ranks, rank=self.rank, first_parts=self.first_parts, kept_at=kept_at, **self.pools, **fields)


def attend(cache, q, sequences, positions, kv_of_head, window=0, *, ranks, first_parts, room=ALL, threads=1, joined=False,
           quantized=False):
    """(status, for each rank its heads and an Activation of them): as ``Cache.attend``, by ranks that share the positions.

    ``joined``: what the ranks find comes as one part, as from MPI; else as a part of each.
    """
    rows, head_dim, heads = len(q), cache.head_dim, len(kv_of_head)
    sequences, positions = np.array(sequences, np.int32), np.array(positions, np.int32)
    members = [Rank(cache, first_parts, ranks, rank) for rank in range(ranks)]
    kept = [np.full(3_000_000, np.nan, np.float32) for _ in members]
    maxima = [np.zeros((rows, heads), np.int64) for _ in members]
    sums = [np.full((rows, heads, head_dim + 1), -1, np.int64) for _ in members]
    arguments, status, found = (sequences, positions, kv_of_head, window, room, threads), 0, []
    def parts_of(arrays, join):
        parts = [join(arrays, axis=0)] if joined else arrays
        return parts, {"parts": np.array([address(part) for part in parts]), "part_count": len(parts)}
    for member, part, own in zip(members, maxima, kept, strict=True):
        status |= member.run(q, *arguments, weighs=0, maxima=part, kept=own)
    held, parts = parts_of(maxima, np.max)
    for member, part, own in zip(members, sums, kept, strict=True):
        status |= member.run(q, *arguments, weighs=1, sums=part, kept=own, **parts)
    held, parts = parts_of(sums, np.sum)
    for rank in range(ranks):
        own = range(heads * rank // ranks, heads * (rank + 1) // ranks)
        target = Activation(rows + 1, len(own) * head_dim, min(head_dim, 256), quantized)
        target.values = target.values[:rows]
        status |= operate(threads, context.finish_operation, context.FINISH, rows=np.array([rows]), heads=len(own),
                          first=own.start, all_heads=heads, head_dim=head_dim, target=target.record, **parts)
        found.append((own, target))
    del held
    return status, found


def check(cache, q, sequences, positions, kv_of_head, window=0, **how):
    """Every rank's heads have the bits that one rank would give them."""
    status, found = attend(cache, q, sequences, positions, kv_of_head, window, **how)
    assert status == OK and len(found) == how["ranks"]
    _, expected = cache.attend(q, sequences, positions, kv_of_head, window)
    for own, target in found:
        part = slice(own.start * cache.head_dim, own.stop * cache.head_dim)
        assert_same(target.values, expected[:, part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "first_parts"), [(2, (0, 1, 0, 1)), (3, (2, 1, 1, 0)), (7, (0, 3, 6, 5))])
@pytest.mark.parametrize("window", [0, 1, 300])
def test_bits_of_one_rank(dtype, ranks, first_parts, window):
    """With more ranks than blocks some have none of a sequence, with a window some see nothing in theirs."""
    cache = Cache(LENGTHS, 2, 48, dtype).write()
    arguments = cache, queries(len(POSITIONS), 48), SEQUENCES, POSITIONS, KV_OF_HEAD, window
    for how in ({}, {"joined": True}, {"room": NOTHING}, {"room": 5, "threads": 2}):
        check(*arguments, ranks=ranks, first_parts=first_parts, **how)


@pytest.mark.parametrize(("heads", "head_dim"), [([9], 16), ([1, 1], 128), ([4], 112), ([0, 3, 0, 2], 12), ([8, 8], 8)])
def test_shapes_of_heads(heads, head_dim):
    cache = Cache([900], len(heads), head_dim, np.uint16).write()
    kv_of_head = np.repeat(np.arange(len(heads)), heads)
    q, positions = queries(7, head_dim, heads=sum(heads)), [3, 4, 5, 6, 255, 256, 899]
    for room in (ALL, 3, NOTHING):
        check(cache, q, [0] * 7, positions, kv_of_head, ranks=2, first_parts=[1], room=room, threads=2)


@pytest.mark.parametrize("window", [2, 16, 100, 257, 513])
def test_rows_of_a_run_whose_windows_end_in_different_blocks(window):
    cache = Cache([1100], 2, 16, np.uint16).write()
    positions = [*range(254, 260), *range(510, 516), *range(765, 775)]
    for room in (ALL, NOTHING):
        check(cache, queries(len(positions), 16), [0] * len(positions), positions, KV_OF_HEAD, window, ranks=3, first_parts=[2],
              room=room)


def test_blocks_whose_weights_vanish():
    cache = Cache([1100], 2, 16, np.uint16, size=30.0).write()
    check(cache, queries(4, 16, heads=2) * np.float32(20), [0] * 4, [255, 256, 600, 1099], (0, 1), ranks=2, first_parts=[0])


def test_outputs_are_quantised():
    cache = Cache([600], 2, 20, np.uint16).write()
    rows = queries(3, 20), [0] * 3, [5, 300, 599]
    _, found = attend(cache, *rows, KV_OF_HEAD, ranks=2, first_parts=[0], quantized=True)
    for own, target in found:
        expected = Activation(4, len(own) * 20, 20, True)
        expected.values = expected.values[:3]
        part = np.ascontiguousarray(rows[0][:, own.start * 20 : own.stop * 20])
        cache.attend(part, *rows[1:], [KV_OF_HEAD[head] for head in own], target=expected)
        for name in ("values", "x", "scales", "corrections"):
            assert_same(getattr(target, name)[:3], getattr(expected, name)[:3])


@pytest.mark.parametrize("bad", [2.0**19, np.inf, np.nan])
def test_values_out_of_range_are_reported(bad):
    cache = Cache([600], 2, 16, np.float32)
    cache.values[0][599, 1, 3] = bad
    cache.write()
    q = queries(4, 16, heads=2)
    for room in (ALL, NOTHING):
        how = {"ranks": 2, "first_parts": [0], "room": room}
        assert attend(cache, q[:3], [0] * 3, [5, 256, 598], (0, 1), **how)[0] == OK
        assert attend(cache, q, [0] * 4, [5, 297, 598, 599], (0, 1), 1, **how)[0] == OUT_OF_RANGE


def test_room_is_dealt_out_run_by_run():
    runs = np.array([[0, 1], [1, 2], [3, 4], [7, 1]], np.int32)
    sequences, positions = np.array([0, 1, 1, 0, 0, 0, 0, 1]), np.array([100, 255, 256, 1000, 1001, 1002, 1003, 511])
    kept_at, first_parts = np.zeros(4, np.int64), np.array([0, 1])
    def dealt(rank, room):
        return context.keep(runs, 4, sequences, positions, first_parts, 2, rank, room, kept_at), kept_at.tolist()
    # Own blocks: 1, 1, 2, 1 of rank 0; 0, 1, 2, 1 of rank 1; times the rows of each run.
    assert dealt(0, 12) == (0, [0, 1, 3, 11]) and dealt(1, 11) == (0, [0, 0, 2, 10])
    assert dealt(0, 11) == (1, [0, 1, 3, -1]) and dealt(0, 4) == (8, [0, 1, -1, 3])
    assert dealt(0, 0) == (12, [-1, -1, -1, -1])


def test_queries_of_all_ranks_are_put_together_as_bits():
    rows, columns = 3, (5, 2, 4)
    own = [queries(rows, n, seed=n, heads=1) for n in columns]
    own[1][1, 0] = np.nan
    starts = np.cumsum((0, *columns))
    outs = [np.full((rows, sum(columns)), np.nan, np.float32) for _ in columns]
    for q, out, first in zip(own, outs, starts, strict=False):
        assert operate(2, context.place_operation, context.PLACE, rows=np.array([rows]), q=q, columns=q.shape[1], out=out,
                       width=sum(columns), first=first) == OK
    whole = sum(out.view(np.int32) for out in outs).view(np.float32)
    assert_same(whole, np.concatenate(own, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_stored_by_the_rank_that_has_the_block(dtype):
    rows, head_dim, ranks, first_parts = 600, 16, 3, [1, 2]
    k, v = queries(rows, head_dim, 1, heads=2), queries(rows, head_dim, 2, heads=2)
    positions = np.r_[0:520, 200:280].astype(np.int32)
    sequences = np.array([0] * 520 + [1] * 80, np.int32)
    cosines, sines = np.ones((600, head_dim // 2), np.float32), np.zeros((600, head_dim // 2), np.float32)
    def store(cache, pages, pools, **fields):
        return operate(1, kv_store.store_operation, kv_store.STORE, rows=np.array([rows]), k=k.copy(), v=v.copy(),
                       k_stride=2 * head_dim, v_stride=2 * head_dim, cosines=cosines, sines=sines, sequences=sequences,
                       positions=positions, pages=pages, pages_stride=pages.shape[1], kv_heads=2, head_dim=head_dim,
                       half=cache.dtype == np.uint16, **pools, **fields)
    whole = Cache([520, 280], 2, head_dim, dtype)
    pools = {"keys": whole.key_pool, "values": whole.value_pool, "key_scales": whole.scale_pools[0],
             "value_scales": whole.scale_pools[1]}
    empty = Cache([520, 280], 2, head_dim, dtype)
    members = [Rank(empty, first_parts, ranks, rank) for rank in range(ranks)]
    assert store(whole, whole.pages, pools) == OK
    for rank, member in enumerate(members):
        assert store(whole, member.pages, member.pools, ranks=ranks, rank=rank, first_parts=member.first_parts) == OK
        expected = Rank(whole, first_parts, ranks, rank)
        for name, pool_of in member.pools.items():
            assert pool_of is None or (assert_same(pool_of, expected.pools[name]) is None)
