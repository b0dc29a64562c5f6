"""Choosing tokens from logits, canonical: integer weights, a total order, integer comparisons.

The weight of a token is rint(exp(l - max) * 2**32); the order is (logit descending, id ascending); top-p, min-p and the draw
compare integers. Random numbers come from Philox4x64-10 (Salmon et al. 2011), keyed by the request, counted by the
sample and the index of the token: a draw depends on nothing else that happens in the batch.
"""

import hashlib

import numpy as np

from .numerics import FIXED, exp, log_probability

_MASK = 2**64 - 1

# Logits are multiples of 2**-32 below 2**20. Below the lowest of these temperatures all weight lies on the maximum,
# above the highest it is the same everywhere, and nothing between them overflows (nor with adjusted logits, below 2**33).
TEMPERATURES = 2.0**-64, 2.0**64
SEGMENT = 4096                  # logits whose largest one, and sum of weights, are found together
NOTHING = np.int64(-(2**63))    # below the key of any logit
_FEW = 256                      # tokens that are put in order at first: most draws need no more


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


def adjust(logits, ids, counts, repetition: float, frequency: float, presence: float) -> None:
    """Penalises tokens ``ids`` int64 [n] in place, of which the answer has ``counts`` int64 [n] so far; float32 logits [V].

    One rounded float32 operation after the other: l / repetition for l > 0, else l * repetition; minus (frequency * count);
    minus presence where count > 0. The order is that of vLLM, the first rule that of Keskar et al. 2019 (CTRL).
    """
    values, factor = logits[ids], np.float32(repetition)
    values = np.where(values > 0, values / factor, values * factor)
    values = values - np.float32(frequency) * counts.astype(np.float32)
    logits[ids] = np.where(counts > 0, values - np.float32(presence), values)


def order_keys(logits, ids):
    """uint64 keys of tokens ``ids`` that sort ascending by (logit descending, id ascending)."""
    bits = logits[ids].view(np.int32).astype(np.int64)
    ascending = np.where(bits < 0, -0x80000000 - bits, bits)
    return ((0x7FFFFFFF - ascending).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)


def token_of(keys: np.ndarray) -> np.ndarray:
    """The tokens of int64 keys, as backends find the largest of a segment: the logit's order in the upper half, below it
    2**31 - 1 - token, so that of equal ones the lowest id comes first."""
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF)


def logit_of(keys: np.ndarray) -> np.ndarray:
    """The float32 logits of int64 keys."""
    high = (keys >> 32).astype(np.int32)
    return np.where(high < 0, np.int32(-0x80000000) - high, high).astype(np.int32).view(np.float32)


def largest(logits, count: int):
    """Ids int64 of the first ``count`` tokens in order; float32 logits [V], finite or -inf."""
    size = logits.shape[0]
    if count < size:
        least = np.partition(logits, size - count)[size - count]
        ids = np.flatnonzero(logits >= least)       # more than ``count`` where others equal the last one
    else:
        ids = np.arange(size)
    return (np.sort(order_keys(logits, ids))[:count] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _beginning(logits, weights, amount: int):
    """Ids of the shortest beginning of the order with at least this ``amount`` of weight."""
    count = _FEW
    while True:
        ids = largest(logits, count)
        cumulative = np.cumsum(weights[ids])
        if cumulative[-1] >= amount:
            return ids[: int(np.searchsorted(cumulative, amount)) + 1]
        count *= 32


def choose(logits, temperature: float, top_k: int, top_p: float, min_p: float, random: int, weigh=weigh) -> int:
    """The token drawn from float32 logits [V] with a 64-bit random number; temperature 0 takes the first in order.

    Temperature divides the logits, then ``top_k`` keeps the first k (0: all), then ``top_p`` keeps the shortest prefix
    with at least that share of the kept weight, then ``min_p`` keeps tokens with at least that share of the first one's
    weight; shares are rounded to multiples of 2**-32. The order is that of the logits themselves: division may make
    neighbours equal. A logit of -inf is never drawn. A temperature beyond ``TEMPERATURES`` counts as the nearer end.
    ``weigh`` is a backend's form of the function above.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.empty(logits.shape, np.int64)
    total = weigh(logits / np.float32(np.clip(temperature, *TEMPERATURES)), weights)[1]
    ids = None                                      # all, in no order
    if 0 < top_k < len(logits):
        ids = largest(logits, top_k)
        total = weights[ids].sum()
    if top_p < 1:
        ids = _beginning(logits, weights, -(-round(top_p * 2**32) * int(total) >> 32))
    kept = weights if ids is None else weights[ids]
    if min_p > 0:
        # The first one's weight is exp(0) = 1.
        kept = np.where(kept < round(min_p * 2**32), 0, kept)
    target = (random * int(kept.sum())) >> 64
    if ids is None:
        return int(_beginning(logits, kept, target + 1)[-1])
    return int(ids[np.searchsorted(np.cumsum(kept), target, side="right")])


def chosen_logprob(logits, token: int, weights, weigh=weigh) -> np.float32:
    """Log-probability of a token under the raw logits, float32, never -0; ``weights`` is int64 [V] scratch."""
    maximum, total = weigh(logits, weights)
    return log_probability(logits[token], maximum, total)
