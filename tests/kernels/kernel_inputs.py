"""Inputs of kernel tests: random weights in the kernels' layouts, KV caches in pages, and equality of bits."""

import numpy as np

from llama_hpc.kernels.cpu import attention, matmul
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import PAGE


def assert_same(actual, expected):
    """Equal dtypes, shapes and bits."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits))


def normal(shape, seed=0, size=1.0):
    """Gaussian float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def float_weights(w, block):
    """Kernel weights from float32 [n, k]."""
    weights = matmul.empty_float_weights(*w.shape, block)
    matmul.fill_float(weights, 0, w)
    return weights


def random_integers(n, blocks, seed=0):
    """int8 values [n, groups, 32], float32 factors [n, groups] of either sign and row scales [n], like real weights."""
    rng = np.random.default_rng(seed)
    values = blocks.pad(rng.integers(-127, 128, (n, blocks.size), np.int8))
    factors = (rng.choice([-1, 1], (n, blocks.groups)) * rng.uniform(0.5, 1.2, (n, blocks.groups))).astype(np.float32)
    return values, factors, rng.uniform(1e-4, 3e-4, n).astype(np.float32)


def integer_weights(values, factors, row_scales, groups_per_block):
    """Kernel weights from what ``random_integers`` gives, or a part of it."""
    weights = matmul.empty_integer_weights(len(values), values.shape[1], groups_per_block)
    matmul.fill_integer(weights, 0, values, factors, row_scales)
    return weights


def random_activations(rows, blocks, seed=0):
    """Whole numbers of -127 … 127 as float32 [rows, groups * 32], and float32 scales [rows, groups]."""
    rng = np.random.default_rng(seed)
    values = blocks.pad(rng.integers(-127, 128, (rows, blocks.size))).astype(np.float32).reshape(rows, -1)
    return values, rng.uniform(0.001, 0.1, (rows, blocks.groups)).astype(np.float32)


def product(kind, n, k, block, tokens, seed=0):
    """Arguments x, x_scales, weights, and sums for ``tokens`` tokens of a random product; kind is float or integer."""
    blocks = Blocks(k, block)
    if kind == "float":
        weights = float_weights(normal((n, k), seed, 0.1), block)
        x, scales = normal((tokens, k), seed + 1), np.zeros((1, 1), np.float32)
    else:
        weights = integer_weights(*random_integers(n, blocks, seed), blocks.groups_per_block)
        x, scales = random_activations(tokens, blocks, seed + 1)
    return x, scales, weights, np.full((tokens, matmul.tiles(n) * matmul.LANES), -1, np.int64)


class Cache:
    """Keys and values of a few sequences in shuffled pages; slots never written are NaN.

    ``keys`` and ``values`` [sequence]: float32 [length, kv_heads, head_dim], as stored (rounded to float16 for uint16).
    """

    def __init__(self, lengths, kv_heads, head_dim, dtype, seed=0, size=1.0):
        rng = np.random.default_rng(seed)
        per_sequence = -(-max(lengths) // PAGE)
        count = per_sequence * len(lengths) + 3
        self.dtype, self.head_dim = np.dtype(dtype), head_dim
        self.pages = rng.permutation(count)[: per_sequence * len(lengths)].astype(np.int32).reshape(-1, per_sequence)
        unwritten = 0x7E00 if self.dtype == np.uint16 else np.nan
        self.key_pool = np.full((count, kv_heads, head_dim, PAGE), unwritten, dtype)
        self.value_pool = np.full((count, kv_heads, PAGE, attention.padded_head_dim(head_dim)), unwritten, dtype)
        shape = kv_heads, head_dim
        self.keys = [self.rounded(normal((length, *shape), rng.integers(1 << 30), size)) for length in lengths]
        self.values = [self.rounded(normal((length, *shape), rng.integers(1 << 30))) for length in lengths]

    def rounded(self, x):
        return x.astype(np.float16).astype(np.float32) if self.dtype == np.uint16 else x

    def stored(self, x):
        """float32 in the pools' dtype."""
        return x.astype(np.float16).view(np.uint16) if self.dtype == np.uint16 else x

    def write(self, store=attention.store, sequences=None, start=0, stop=None):
        """Stores positions start … stop - 1 of the given sequences (all of them)."""
        for s in range(len(self.keys)) if sequences is None else sequences:
            keys, values = (self.stored(x[s][start:stop].reshape(-1, x[s][0].size)) for x in (self.keys, self.values))
            positions = np.arange(start, start + len(keys), dtype=np.int32)
            slots = np.full(len(keys), s, np.int32)
            store(keys, values, self.key_pool, self.value_pool, self.pages, slots, positions, len(keys))
        return self

    def attend(self, q, sequences, positions, kv_of_head, window=0, scale=None, threads=1, kernel=attention.attention):
        """(status, out) of float32 q [rows, heads * head_dim]."""
        out = np.full(q.shape, np.nan, np.float32)
        work = attention.workspace(threads, self.pages.shape[1] * PAGE, self.head_dim)
        work[:] = np.nan
        scale = 1 / np.sqrt(self.head_dim) if scale is None else scale
        status = kernel(q, self.key_pool, self.value_pool, self.pages, np.array(sequences, np.int32),
                        np.array(positions, np.int32), np.array(kv_of_head, np.int32), window, np.float32(scale), out,
                        work, len(q))
        return status, out
