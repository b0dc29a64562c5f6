"""Storing keys and values: bits of the plain rules in every format of the cache, and what none of them can hold."""

import numpy as np
import pytest
from kernel_inputs import assert_same, normal
from kv_caches import DTYPES, Cache, operate

from llama_hpc.kernels import reference
from llama_hpc.kernels.cpu import kv_store
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE, rope_table


class Rows:
    """q [rows, 3 heads], k and v [rows, 2 heads] of rows of two sequences, side by side as one product yields them."""

    def __init__(self, head_dim, dtype, rows=21):
        self.cache, self.head_dim, self.rows = Cache([40, 300], 2, head_dim, dtype), head_dim, rows
        self.both = normal((rows, 7 * head_dim), 3, 4.0)
        cuts = [3 * head_dim, 5 * head_dim]
        self.q, self.k, self.v = np.split(self.both, cuts, axis=1)
        self.sequences = np.array([0] * 5 + [1] * (rows - 5), np.int32)
        self.positions = np.r_[35:40, 250 : 250 + rows - 5].astype(np.int32)
        self.table = rope_table(np.arange(1, head_dim // 2 + 1, dtype=np.uint64) << np.uint64(52), 300)
        self.norms = normal(head_dim, 7), normal(head_dim, 8)
        self.eps = np.array([1e-5])

    def store(self, normed=False, threads=1):
        """The operation; returns its status."""
        cache, norms = self.cache, self.norms if normed else (None, None)
        at = [part.__array_interface__["data"][0] for part in (self.q, self.k, self.v)]
        return operate(
            threads, kv_store.store_operation, kv_store.STORE, rows=np.array([self.rows]), q=at[0], k=at[1], v=at[2],
            q_stride=self.both.shape[1], k_stride=self.both.shape[1], v_stride=self.both.shape[1], cosines=self.table[0],
            sines=self.table[1], sequences=self.sequences, positions=self.positions, pages=cache.pages,
            pages_stride=cache.pages.shape[1], keys=cache.key_pool, values=cache.value_pool, heads=3, kv_heads=2,
            head_dim=self.head_dim, q_norm=norms[0], k_norm=norms[1], eps=self.eps, half=cache.dtype == np.uint16,
            key_scales=cache.scale_pools[0], value_scales=cache.scale_pools[1])

    def reference_store(self, normed):
        """The same by the plain rules."""
        for x, norm in ((self.q, self.norms[0]), (self.k, self.norms[1])):
            heads = x.reshape(-1, self.head_dim)
            if normed:
                assert reference.rms_norm(heads, norm, self.eps[0], heads, len(heads)) == OK
            x[:] = heads.reshape(x.shape)
            reference.rope(turned := x.copy(), *self.table, self.positions, self.rows)
            x[:] = turned
        keys, values = self.k, self.v
        if self.cache.dtype == np.uint16:
            keys, values = (np.empty(x.shape, np.uint16) for x in (self.k, self.v))
            assert reference.to_half(self.k, keys, self.rows) == reference.to_half(self.v, values, self.rows) == OK
        if self.cache.dtype == np.int8:
            both = [np.ascontiguousarray(x).reshape(self.rows, 2, self.head_dim) for x in (self.k, self.v)]
            (key_status, keys, _), (value_status, values, _) = map(reference.quantize_heads, both)
            assert key_status == value_status == OK
            self.cache.write_scales(both, self.sequences, self.positions)
        reference.store(keys, values, self.cache.key_pool, self.cache.value_pool, self.cache.pages, self.sequences,
                        self.positions, self.rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, normed, threads", [(8, False, 1), (20, True, 2), (64, True, 3), (80, False, 2),
                                                      (128, True, 1)])
def test_storing_follows_the_reference(dtype, head_dim, normed, threads):
    ours, theirs = Rows(head_dim, dtype), Rows(head_dim, dtype)
    assert ours.store(normed, threads) == OK
    theirs.reference_store(normed)
    assert_same(ours.q, theirs.q)
    assert_same(ours.cache.key_pool, theirs.cache.key_pool)
    assert_same(ours.cache.value_pool, theirs.cache.value_pool)
    for pools in zip(ours.cache.scale_pools, theirs.cache.scale_pools, strict=True) if dtype == np.int8 else ():
        assert_same(*pools)


@pytest.mark.parametrize("bad", [65520.0, -1e9, np.inf, np.nan])
def test_what_a_float16_cannot_hold_is_reported(bad):
    for part, value in (("k", 4 * bad), ("v", bad)):            # a rotation may shrink a key
        rows = Rows(16, np.uint16)
        getattr(rows, part)[7, 3] = value
        assert rows.store() == OUT_OF_RANGE
    rows = Rows(16, np.uint16)
    rows.v[:] = np.float32(65504.0)
    assert rows.store() == OK


def test_a_norm_of_what_is_not_finite_is_reported():
    rows = Rows(16, np.float32)
    rows.q[7, 3] = np.nan
    assert rows.store(normed=True) == NOT_FINITE


def int8_rows(head):
    """The operation's pools after one head of values, and its status; keys as well where they need no rotation."""
    rows = Rows(len(head), np.int8, rows=6)
    rows.v[:] = np.tile(head, 2)
    return rows.store(), rows


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-8, 1e-6, 7e-4, 1.0, 127.0, 6e4, 8.3e6])
def test_int8_values_of_any_size(size):
    """As the reference quantises them, within half a step of what was given, and no scale below the greatest value / 127."""
    head = np.r_[1.0, -1.0, normal(14, 2) / 4].astype(np.float32) * np.float32(size)
    status, rows = int8_rows(head)
    page, slot = rows.cache.pages[0, 2], 3
    found, scales = rows.cache.value_pool[page, 0, slot], rows.cache.scale_pools[1][page, 0, slot]
    _, values, expected = reference.quantize_heads(head[None, None])
    assert status == OK
    assert_same(found, values[0, 0])
    assert scales == expected[0, 0]
    scale = float(scales.view(np.float16))
    assert (np.abs(found * scale - head.astype(np.float64)) <= scale * 0.500001 + 1e-42).all()
    assert size < 1e-42 or size / 127 * 0.999999 <= scale <= max(size / 127 * 1.001, size / 127 + 2**-24)


@pytest.mark.parametrize("bad", [1e7, np.inf, -np.inf, np.nan])
def test_what_no_scale_can_hold_is_reported(bad):
    head = np.zeros(16, np.float32)
    assert int8_rows(head)[0] == OK
    head[5] = bad
    assert int8_rows(head)[0] == OUT_OF_RANGE
    assert reference.quantize_heads(head[None, None])[0] == OUT_OF_RANGE
