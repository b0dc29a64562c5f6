"""Choosing tokens from logits, canonical: integer weights, a total order, integer comparisons.

The weight of a token is rint(exp(l - max) * 2**32); the order is (logit descending, id ascending); top-p and the draw
compare integers. Random numbers come from Philox4x64-10 (Salmon et al. 2011), keyed by the request, counted by the
index of the token: a draw depends on nothing else that happens in the batch.
"""

import hashlib

import numpy as np

from .numerics import FIXED, exp, log_probability

_MASK = 2**64 - 1

# Logits are multiples of 2**-32 below 2**20. Below the lowest of these temperatures all weight lies on the maximum,
# above the highest it is the same everywhere, and nothing between them overflows.
TEMPERATURES = 2.0**-64, 2.0**64


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10: four 64-bit random numbers from a key of two and a counter of four."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _MASK, (p0 >> 64) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return c0, c1, c2, c3


def request_key(seed: int, request_id: str) -> tuple[int, int]:
    """The Philox key of a request: its seed, and the first 8 bytes (little-endian) of the SHA-256 of its id."""
    return seed & _MASK, int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "little")


def weigh(logits, weights):
    """weights[i] = rint(exp(logits[i] - maximum) * 2**32) as int64 for float32 logits [V]; returns (maximum, sum)."""
    maximum = logits.max()
    weights[:] = np.rint(exp(logits - maximum) * FIXED).astype(np.int64)
    return maximum, int(weights.sum())


def order_keys(logits):
    """uint64 keys that sort ascending by (logit descending, id ascending)."""
    bits = logits.view(np.int32).astype(np.int64)
    ascending = np.where(bits < 0, -0x80000000 - bits, bits)
    return ((0x7FFFFFFF - ascending).astype(np.uint64) << np.uint64(32)) | np.arange(logits.shape[0], dtype=np.uint64)


def choose(logits, temperature: float, top_k: int, top_p: float, random: int, weigh=weigh) -> int:
    """The token drawn from float32 logits [V] with a 64-bit random number; temperature 0 takes the first in order.

    Temperature divides the logits, then ``top_k`` keeps the first k (0: all), then ``top_p`` keeps the shortest prefix
    with at least that share of the kept weight. The order is that of the logits themselves: division may make
    neighbours equal. A temperature beyond ``TEMPERATURES`` counts as the nearer end. ``weigh`` is a backend's form of
    the function above.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.empty(logits.shape, np.int64)
    weigh(logits / np.float32(np.clip(temperature, *TEMPERATURES)), weights)
    keys = order_keys(logits)
    if 0 < top_k < keys.shape[0]:
        keys = np.partition(keys, top_k - 1)[:top_k]
    ids = (np.sort(keys) & np.uint64(0xFFFFFFFF)).astype(np.int64)
    cumulative = np.cumsum(weights[ids])
    kept = len(ids)
    if top_p < 1:
        share = -(-round(top_p * 2**32) * int(cumulative[-1]) >> 32)
        kept = min(int(np.searchsorted(cumulative, share, side="left")) + 1, kept)
    target = (random * int(cumulative[kept - 1])) >> 64
    return int(ids[np.searchsorted(cumulative[:kept], target, side="right")])


def chosen_logprob(logits, token: int, weights, weigh=weigh) -> np.float32:
    """Log-probability of a token under the raw logits, float32, never -0; ``weights`` is int64 [V] scratch."""
    maximum, total = weigh(logits, weights)
    return log_probability(logits[token], maximum, total)
