"""Every kernel in plain NumPy, written from the rules: the same bits as the backends, only slow.

Products and conversions are elementwise over whole arrays, a chain is a Python loop over its terms, and a sum is one of
integers. Statuses are as in ``cpu``. After a status other than ``OK`` the output is not defined, here or there.
"""

import numpy as np

from .formats import Blocks, Packed
from .numerics import (
    ATTENTION_BLOCK,
    BLOCK_LIMIT,
    FIXED,
    NOT_FINITE,
    OK,
    OUT_OF_RANGE,
    OUTPUT_LIMIT,
    PAGE,
    TINY,
    UNFIXED,
    exp,
    fma,
    sigmoid,
)
from .sampling import weigh

__all__ = ["attention", "embedding", "exp", "finish", "half_bits", "matmul", "quantize_heads", "quantize_rows", "rms_norm",
           "rope", "sigmoid", "silu_multiply", "store", "store_scales", "to_half", "weigh"]

_QUIET = np.errstate(all="ignore")      # infinities and NaN are told by the status


def to_fixed(values):
    """float32 to int64 multiples of 2**-32, and whether each is within a block value's range; others become zero."""
    within = np.abs(values) < BLOCK_LIMIT
    return np.rint(np.where(within, values, np.float32(0)) * FIXED).astype(np.int64), within


def from_fixed(total):
    """int64 multiples of 2**-32 to the nearest float64, and that to the nearest float32."""
    return (total.astype(np.float64) * UNFIXED).astype(np.float32)


def quantize_rows(x, block: int):
    """Per row and group of 32 k: int8 values rint(x * (127 / amax)) [rows, groups, 32], float32 scales amax / 127 [rows, groups].

    ``block``: k per reduction block, in each of which groups start afresh. Returns (status, values, scales).
    """
    groups = Blocks(x.shape[1], block).pad(x)
    amax = np.abs(groups).max(axis=2)
    if not np.isfinite(amax).all():
        return NOT_FINITE, np.zeros(groups.shape, np.int8), np.zeros(amax.shape, np.float32)
    small = amax < TINY
    inverse = np.where(small, np.float32(0), np.float32(127) / np.where(small, np.float32(1), amax))
    return OK, np.rint(groups * inverse[:, :, None]).astype(np.int8), np.where(small, np.float32(0), amax / np.float32(127))


@_QUIET
def matmul(x, weights, block: int):
    """(status, int64 [M, N]): for float32 x [M, K], multiples of 2**-32 that are the sums of rint(block value * 2**32).

    ``weights``: float32 [N, K] or float16 [N, K] in uint16, which x multiplies as it is; or a ``Packed``, and x is quantised.
    """
    if isinstance(weights, Packed):
        status, values, scales = quantize_rows(x, block)
        chains, row_scales = _integer_chains(values, scales, weights), weights.unpack()[2]
    else:
        status, row_scales = OK, np.float32(1)
        chains = _float_chains(x, _floats(weights), block)
    sums = np.zeros((len(x), weights.n if isinstance(weights, Packed) else len(weights)), np.int64)
    for chain in chains:
        fixed, within = to_fixed(chain * row_scales)
        sums += fixed
        status = status if within.all() else status | OUT_OF_RANGE
    return status, sums


def _float_chains(x, w, block):
    """The block values, float32 [M, N], before the row scale."""
    for start in range(0, w.shape[1], block):
        chain = np.zeros((len(x), len(w)), np.float32)
        for k in range(start, min(start + block, w.shape[1])):
            chain = fma(w[:, k], x[:, k, None], chain)
        yield chain


def _integer_chains(x, x_scales, weights):
    """As ``_float_chains``, over groups with exact dot products."""
    values, factors, _ = weights.unpack()
    for start in range(0, weights.blocks.groups, weights.blocks.groups_per_block):
        chain = np.zeros((len(x), weights.n), np.float32)
        for group in range(start, min(start + weights.blocks.groups_per_block, weights.blocks.groups)):
            dots = x[:, group].astype(np.int64) @ values[:, group].T.astype(np.int64)
            chain = fma(dots.astype(np.float32), factors[:, group] * x_scales[:, group, None], chain)
        yield chain


@_QUIET
def quantize_heads(x):
    """Per row and head of float32 [rows, heads, head_dim]: int8 values, and the float16 bits of one scale [rows, heads].

    The scale is the least float16 that is not below amax / 127, so that none of rint(x * (1 / scale)) is beyond 127; values of a
    head of zeros are zero. Returns (status, values, scales); ``OUT_OF_RANGE`` where a scale is not finite.
    """
    exact = np.abs(x).max(axis=2) / np.float32(127)
    scales = half_bits(exact)
    scales = scales + (_floats(scales) < exact)
    known = _floats(scales)
    inverse = np.where(known > 0, np.float32(1) / known, np.float32(0))
    status = OK if np.isfinite(known).all() else OUT_OF_RANGE
    return status, np.rint(x * inverse[:, :, None]).astype(np.int8), scales


def store(keys, values, key_pool, value_pool, pages, sequences, positions, rows: int) -> int:
    """Writes [rows, kv_heads * head_dim] keys and values to their pages: see ``cpu.kv_store``."""
    heads, head_dim = key_pool.shape[1:3]
    for r in range(rows):
        page, slot = pages[sequences[r], positions[r] // PAGE], positions[r] % PAGE
        key_pool[page, :, :, slot] = keys[r].reshape(heads, head_dim)
        value_pool[page, :, slot, :head_dim] = values[r].reshape(heads, head_dim)
    return OK


def store_scales(scales, pool, pages, sequences, positions, rows: int) -> None:
    """Writes scales [rows, kv_heads] of int8 keys or values to their pages."""
    for r in range(rows):
        pool[pages[sequences[r], positions[r] // PAGE], :, positions[r] % PAGE] = scales[r]


@_QUIET
def attention(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window: int, scale, out, work,
              rows: int, key_scales=None, value_scales=None) -> int:
    """out[r, h] = softmax(q[r, h] · keys * scale) values over the positions visible to row r: see ``cpu.attention``.

    Int8 pools come with the pools of their scales.
    """
    heads, head_dim, status = len(kv_of_head), key_pool.shape[2], OK
    for r in range(rows):
        end = int(positions[r]) + 1
        begin = max(0, end - window) if window else 0
        blocks = []
        for start in range(begin // ATTENTION_BLOCK * ATTENTION_BLOCK, end, ATTENTION_BLOCK):
            visible = np.arange(max(begin, start), min(end, start + ATTENTION_BLOCK))
            page, slot = pages[sequences[r], visible // PAGE][:, None], visible[:, None] % PAGE
            keys = _floats(key_pool[page, kv_of_head, :, slot])
            values = _floats(value_pool[page, kv_of_head, slot, :head_dim])
            scales = [np.float32(1) if pool is None else _floats(pool[page, kv_of_head, slot])
                      for pool in (key_scales, value_scales)]
            blocks.append(_attention_block(q[r].reshape(heads, head_dim), keys, values, np.float32(scale), *scales))
        result, within = _merge(*(np.array(part) for part in zip(*blocks, strict=True)))
        out[r] = result.reshape(-1)
        status = status if within else OUT_OF_RANGE
    return status


def _floats(stored):
    """As float32: float16 bits by their value, int8 and float32 as they are."""
    return (stored.view(np.float16) if stored.dtype == np.uint16 else stored).astype(np.float32)


def _attention_block(q, keys, values, scale, key_scales, value_scales):
    """Maximum [heads], sum of weights [heads] and weighted values [heads, head_dim] of one block, all float32.

    q is [heads, head_dim]; keys and values are [positions, heads, head_dim]; their scales [positions, heads], or 1.
    """
    scores = np.zeros(keys.shape[:2], np.float32)
    for d in range(q.shape[1]):
        scores = fma(q[:, d], keys[:, :, d], scores)
    scores = scores * scale * key_scales
    maximum = scores.max(axis=0)
    weights = exp(scores - maximum)
    total = from_fixed(np.rint(weights * FIXED).astype(np.int64).sum(axis=0))
    weighted = np.zeros(q.shape, np.float32)
    for weight, value in zip(weights * value_scales, values, strict=True):
        weighted = fma(weight[:, None], value, weighted)
    return maximum, total, weighted


def _merge(maxima, totals, weighted):
    """Attention [heads, head_dim] from its blocks, stacked along the first axis, and whether it stayed in range."""
    weights = exp(maxima - maxima.max(axis=0))
    divisor = from_fixed(np.rint(totals * weights * FIXED).astype(np.int64).sum(axis=0))
    fixed, within = to_fixed(weighted * weights[:, :, None])
    return from_fixed(fixed.sum(axis=0)) / divisor[:, None], within.all()


@_QUIET
def rms_norm(x, weight, eps, out, rows: int) -> int:
    """out[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight for float32 [rows, n]: see ``cpu.elementwise``."""
    for r in range(rows):
        row = x[r].copy()
        if not np.isfinite(row).all():
            return NOT_FINITE
        exponent = np.frexp(np.abs(row).max())[1] - 1
        unit = np.ldexp(np.float32(1), max(exponent, -100))
        scaled = row * (np.float32(1) / unit)
        total = np.rint(scaled * scaled * FIXED).astype(np.int64).sum()
        mean = np.float64(total) * UNFIXED / len(row) * (np.float64(unit) * np.float64(unit)) + eps
        out[r] = row * np.float32(1.0 / np.sqrt(mean)) * weight
    return OK


def finish(sums, bias=None):
    """(status, y) with y = float32(sums * 2**-32) + bias for int64 [M, N]."""
    y = from_fixed(sums)
    status = OK if (np.abs(y) < OUTPUT_LIMIT).all() else OUT_OF_RANGE
    return status, y if bias is None else y + bias


def silu_multiply(gate, up):
    """(gate * sigmoid(gate)) * up, float32."""
    return gate * sigmoid(gate) * up


def rope(x, cosines, sines, positions, rows: int) -> int:
    """Rotates float32 [rows, heads * head_dim] in place, in half-split pairs: see ``cpu.elementwise``."""
    half = cosines.shape[1]
    heads = x[:rows].reshape(rows, -1, 2, half)
    a, b = heads[:, :, 0].copy(), heads[:, :, 1].copy()
    c, s = cosines[positions[:rows], None], sines[positions[:rows], None]
    heads[:, :, 0] = fma(-b, s, a * c)
    heads[:, :, 1] = fma(a, s, b * c)
    return OK


@_QUIET
def half_bits(x):
    """The float16 nearest to float32 (half to even), as uint16; 0x7C00 and above where it would not be finite."""
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def to_half(x, out, rows: int) -> int:
    """out = the bits of float16(x), uint16 [rows, n]; ``OUT_OF_RANGE`` where a value is not finite as a float16."""
    out[:rows] = half_bits(x[:rows])
    return OK if np.isfinite(out[:rows].view(np.float16)).all() else OUT_OF_RANGE


def embedding(table, tokens, first: int, held: int):
    """float32 [M, K]: row tokens[r] of a table, as float32; zeros where it is not among ``held`` rows from ``first`` on."""
    values = table.dequantize() if isinstance(table, Packed) else _floats(table)
    here = (first <= tokens) & (tokens < first + held)
    return np.where(here[:, None], values[np.where(here, tokens, 0)], np.float32(0))
