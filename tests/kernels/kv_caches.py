"""A KV cache of a few sequences, and attention over it by the reference and by the kernel."""

from functools import cache as cached

import numpy as np
from kernel_inputs import normal

from llama_hpc.kernels import reference
from llama_hpc.kernels.attention_inputs import padded_head_dim
from llama_hpc.kernels.cpu import attention
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
from llama_hpc.kernels.numerics import OK, PAGE

DTYPES = np.uint16, np.float32, np.int8


@cached
def pool(threads):
    return Pool(threads)


def operate(threads, function, dtype, **fields):
    """Runs one operation; returns its status."""
    program = Program(pool(threads))
    program.add("test", function, dtype, ONE_TASK.record(threads), **fields)
    program.run()
    return int(program.status[0])


def queries(rows, head_dim, seed=5, heads=5):
    return normal((rows, heads * head_dim), seed, 2.0)


class Cache:
    """Keys and values of a few sequences in shuffled pages; slots never written are NaN.

    ``keys`` and ``values`` [sequence]: float32 [length, kv_heads, head_dim], as stored (rounded to float16 for uint16, quantised
    for int8, whose scales are in ``scale_pools``: of keys, of values).
    """

    def __init__(self, lengths, kv_heads, head_dim, dtype, seed=0, size=1.0):
        rng = np.random.default_rng(seed)
        per_sequence = -(-max(lengths) // PAGE)
        count = per_sequence * len(lengths) + 3
        self.dtype, self.head_dim = np.dtype(dtype), head_dim
        self.pages = rng.permutation(count)[: per_sequence * len(lengths)].astype(np.int32).reshape(-1, per_sequence)
        unwritten = {"u": 0x7E00, "f": np.nan, "i": -128}[self.dtype.kind]
        scales = [np.full((count, kv_heads, PAGE), 0x7E00, np.uint16) for _ in range(2)]
        self.scale_pools = scales if self.dtype == np.int8 else [None, None]
        self.key_pool = np.full((count, kv_heads, head_dim, PAGE), unwritten, dtype)
        self.value_pool = np.full((count, kv_heads, PAGE, padded_head_dim(head_dim)), unwritten, dtype)
        shape = kv_heads, head_dim
        self.keys = [self.rounded(normal((length, *shape), rng.integers(1 << 30), size)) for length in lengths]
        self.values = [self.rounded(normal((length, *shape), rng.integers(1 << 30))) for length in lengths]

    def rounded(self, x):
        if self.dtype == np.int8:
            status, values, scales = reference.quantize_heads(x)
            assert status == OK
            return values * scales.view(np.float16).astype(np.float32)[:, :, None]
        return x.astype(np.float16).astype(np.float32) if self.dtype == np.uint16 else x

    def stored(self, x):
        """float32 in the pools' dtype."""
        if self.dtype == np.int8:
            return reference.quantize_heads(x.reshape(len(x), -1, self.head_dim))[1].reshape(x.shape)
        return x.astype(np.float16).view(np.uint16) if self.dtype == np.uint16 else x

    def write(self, sequences=None, start=0, stop=None):
        """Stores positions start … stop - 1 of the given sequences (all of them)."""
        for s in range(len(self.keys)) if sequences is None else sequences:
            keys, values = (self.stored(x[s][start:stop].reshape(-1, x[s][0].size)) for x in (self.keys, self.values))
            positions = np.arange(start, start + len(keys), dtype=np.int32)
            slots = np.full(len(keys), s, np.int32)
            reference.store(keys, values, self.key_pool, self.value_pool, self.pages, slots, positions, len(keys))
            self.write_scales((self.keys[s][start:stop], self.values[s][start:stop]), slots, positions)
        return self

    def write_scales(self, both, sequences, positions):
        """Those of float32 keys and values [rows, kv_heads, head_dim]."""
        for x, pool in zip(both, self.scale_pools, strict=True):
            if pool is not None:
                reference.store_scales(reference.quantize_heads(x)[2], pool, self.pages, sequences, positions, len(x))

    def expected(self, q, sequences, positions, kv_of_head, window=0):
        """(status, out) of the reference."""
        out = np.full(q.shape, np.nan, np.float32)
        status = reference.attention(q, self.key_pool, self.value_pool, self.pages, np.array(sequences), np.array(positions),
                                     np.array(kv_of_head), window, self.head_dim**-0.5, out, None, len(q), *self.scale_pools)
        return status, out

    def attend(self, q, sequences, positions, kv_of_head, window=0, threads=1, single=False, target=None):
        """(status, out) of float32 q [rows, heads * head_dim]; ``single``: every row is a run of its own."""
        rows, head_dim = len(q), self.head_dim
        target = target or Activation(rows, q.shape[1], min(head_dim, 256), False)
        target.values[:] = np.nan
        sequences, positions = np.array(sequences, np.int32), np.array(positions, np.int32)
        runs = np.stack([np.arange(rows), np.ones(rows)], 1).astype(np.int32)
        count = rows if single else attention.runs_of(sequences, positions, rows, runs)
        scratch = 128 + attention.scratch_bytes(self.pages.shape[1] * PAGE, head_dim, max(np.bincount(kv_of_head)))
        pool(threads).need_scratch(scratch)
        for own in pool(threads)._scratch:
            own[:] = 0xFF
        kv_heads = self.key_pool.shape[1]
        head_starts = np.searchsorted(kv_of_head, range(kv_heads + 1)).astype(np.int32)
        operation = {"u": attention.attention_operation, "f": attention.float32_attention_operation,
                     "i": attention.int8_attention_operation}[self.dtype.kind]
        status = operate(
            threads, operation, attention.ATTENTION, runs=runs, run_count=np.array([count]), q=q,
            q_stride=q.shape[1], keys=self.key_pool, values=self.value_pool, pages=self.pages, pages_stride=self.pages.shape[1],
            sequences=sequences, positions=positions, head_starts=head_starts, kv_heads=kv_heads, head_dim=head_dim,
            window=window, scale=np.array([head_dim**-0.5], np.float32), target=target.record, scratch=128,
            key_scales=self.scale_pools[0], value_scales=self.scale_pools[1])
        return status, target.values
