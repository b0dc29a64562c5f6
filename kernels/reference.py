"""Every kernel in plain NumPy, written from the rules: same names, signatures and bits as the backends, only slow.

Products and conversions are elementwise over whole arrays, a chain is a Python loop over its terms, and a sum is one of
integers. ``rows``, the arrays that the caller owns, and the statuses are as in ``cpu``; ``threads`` and ``work`` change
nothing here. After a status other than ``OK`` the output is not defined, here or there.
"""

import numpy as np

from .formats import Blocks
from .numerics import (
    ATTENTION_BLOCK,
    BLOCK_LIMIT,
    FIXED,
    GROUP,
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

__all__ = ["attention", "exp", "finish", "finish_add", "float_embedding", "half_bits", "integer_embedding", "matmul",
           "quantize_rows", "rms_norm", "rope", "sigmoid", "silu_multiply", "store", "to_half", "weigh"]

LANES = 16                      # rows of weights that lie interleaved
_QUIET = np.errstate(all="ignore")      # infinities and NaN are told by the status


def to_fixed(values):
    """float32 to int64 multiples of 2**-32, and whether each is within a block value's range; others become zero."""
    within = np.abs(values) < BLOCK_LIMIT
    return np.rint(np.where(within, values, np.float32(0)) * FIXED).astype(np.int64), within


def from_fixed(total):
    """int64 multiples of 2**-32 to the nearest float64, and that to the nearest float32."""
    return (total.astype(np.float64) * UNFIXED).astype(np.float32)


@_QUIET
def matmul(x, x_scales, weights, sums, rows: int, threads: int = 1) -> int:
    """sums[m, n] = sum over reduction blocks of rint(block value * 2**32): see ``cpu.matmul``."""
    chains = _integer_chains if hasattr(weights, "factors") else _float_chains
    sums[:rows], status = 0, OK
    for chain in chains(x[:rows], x_scales[:rows], weights, sums.shape[1]):
        fixed, within = to_fixed(chain * weights.row_scales)
        sums[:rows] += fixed
        status = status if within.all() else OUT_OF_RANGE
    return status


def _columns(interleaved, width):
    """[tiles, columns, 16] to [columns, width]: one row of weights in each column."""
    return interleaved.transpose(1, 0, 2).reshape(interleaved.shape[1], width)


def _float_chains(x, x_scales, weights, width):
    """The block values, float32 [rows, width], before the row scale; weights are float32, or float16 in uint16."""
    w = _columns(_floats(weights.values), width)
    for start in range(0, weights.columns, weights.block):
        chain = np.zeros((len(x), width), np.float32)
        for k in range(start, min(start + weights.block, weights.columns)):
            chain = fma(w[k], x[:, k, None], chain)
        yield chain


def _integer_chains(x, x_scales, weights, width):
    """As ``_float_chains``, over groups with exact dot products."""
    w, factors = _columns(weights.values, width).astype(np.int64), _columns(weights.factors, width)
    for start in range(0, weights.groups, weights.groups_per_block):
        chain = np.zeros((len(x), width), np.float32)
        for group in range(start, min(start + weights.groups_per_block, weights.groups)):
            k = slice(group * GROUP, (group + 1) * GROUP)
            dots = x[:, k].astype(np.int64) @ w[k]
            chain = fma(dots.astype(np.float32), factors[group] * x_scales[:, group, None], chain)
        yield chain


def store(keys, values, key_pool, value_pool, pages, sequences, positions, rows: int) -> int:
    """Writes [rows, kv_heads * head_dim] keys and values to their pages: see ``cpu.attention``."""
    heads, head_dim = key_pool.shape[1:3]
    for r in range(rows):
        page, slot = pages[sequences[r], positions[r] // PAGE], positions[r] % PAGE
        key_pool[page, :, :, slot] = keys[r].reshape(heads, head_dim)
        value_pool[page, :, slot, :head_dim] = values[r].reshape(heads, head_dim)
    return OK


@_QUIET
def attention(q, key_pool, value_pool, pages, sequences, positions, kv_of_head, window: int, scale, out, work,
              rows: int) -> int:
    """out[r, h] = softmax(q[r, h] · keys * scale) values over the positions visible to row r: see ``cpu.attention``."""
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
            blocks.append(_attention_block(q[r].reshape(heads, head_dim), keys, values, np.float32(scale)))
        result, within = _merge(*(np.array(part) for part in zip(*blocks, strict=True)))
        out[r] = result.reshape(-1)
        status = status if within else OUT_OF_RANGE
    return status


def _floats(stored):
    return stored.view(np.float16).astype(np.float32) if stored.dtype == np.uint16 else stored


def _attention_block(q, keys, values, scale):
    """Maximum [heads], sum of weights [heads] and weighted values [heads, head_dim] of one block, all float32.

    q is [heads, head_dim]; keys and values are [positions, heads, head_dim].
    """
    scores = np.zeros(keys.shape[:2], np.float32)
    for d in range(q.shape[1]):
        scores = fma(q[:, d], keys[:, :, d], scores)
    scores = scores * scale
    maximum = scores.max(axis=0)
    weights = exp(scores - maximum)
    total = from_fixed(np.rint(weights * FIXED).astype(np.int64).sum(axis=0))
    weighted = np.zeros(q.shape, np.float32)
    for weight, value in zip(weights, values, strict=True):
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


def quantize_rows(x, block: int, out, scales, rows: int) -> int:
    """Per row and group of 32 k: out = rint(x * (127 / amax)), scale = amax / 127: see ``cpu.elementwise``."""
    groups = Blocks(x.shape[1], block).pad(x[:rows])
    amax = np.abs(groups).max(axis=2)
    if not np.isfinite(amax).all():
        return NOT_FINITE
    small = amax < TINY
    inverse = np.where(small, np.float32(0), np.float32(127) / np.where(small, np.float32(1), amax))
    out[:rows] = np.rint(groups * inverse[:, :, None]).reshape(rows, -1)
    scales[:rows] = np.where(small, np.float32(0), amax / np.float32(127))
    return OK


def finish(sums, bias, out, rows: int) -> int:
    """out[r, n] = float32(sums[r, n] * 2**-32) + bias[n]; ``bias`` may be empty: see ``cpu.elementwise``."""
    y = from_fixed(sums[:rows, : out.shape[1]])
    out[:rows] = y + bias if len(bias) else y
    return OK if (np.abs(y) < OUTPUT_LIMIT).all() else OUT_OF_RANGE


def finish_add(sums, bias, out, rows: int) -> int:
    """out[r, n] += float32(sums[r, n] * 2**-32) + bias[n]; ``bias`` may be empty: see ``cpu.elementwise``."""
    y = np.empty((rows, out.shape[1]), np.float32)
    status = finish(sums, bias, y, rows)
    out[:rows] += y
    return status


def silu_multiply(gate, up, out, rows: int) -> int:
    """out = (gate * sigmoid(gate)) * up, float32 [rows, n]."""
    g = gate[:rows]
    out[:rows] = g * sigmoid(g) * up[:rows]
    return OK


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


def float_embedding(values, columns: int, tokens, first: int, rows_held: int, out, rows: int) -> int:
    """out[r] = row tokens[r] of a float table held from row ``first`` on; zeros where the token lies elsewhere.

    The table is float32, or float16 in uint16.
    """
    for r in range(rows):
        tile, lane = divmod(tokens[r] - first, LANES)
        out[r] = _floats(values[tile, :columns, lane]) if 0 <= tokens[r] - first < rows_held else 0
    return OK


def integer_embedding(values, factors, row_scales, columns: int, tokens, first: int, rows_held: int, out,
                      rows: int) -> int:
    """As ``float_embedding`` for quantised rows: (value * factor) * row scale."""
    for r in range(rows):
        row = tokens[r] - first
        tile, lane = divmod(row, LANES)
        out[r] = 0
        if 0 <= row < rows_held:
            factor = factors[tile, :, lane].repeat(GROUP)[:columns]
            out[r] = values[tile, :columns, lane].astype(np.float32) * factor * row_scales[row]
    return OK
