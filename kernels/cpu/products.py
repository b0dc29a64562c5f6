"""Operations of a program: products y = x Wᵀ of quantised activations and weights, with what follows them fused in.

Canonical: exact int8 dot products of groups, one float chain a reduction block, int64 sums of blocks (``panels``). The team
shares out panels of 32 rows. A product may have several parts (q, k and v; gate and up) that read the same activations.
"""

from functools import cache

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic, overload

from ..numerics import BLOCK_LIMIT, FIXED, OUT_OF_RANGE, OUTPUT_LIMIT, UNFIXED
from . import panels_wide, simd
from . import simd_int8 as int8
from . import simd_weights as coded
from .activations import activation_at
from .elementwise import quantize_group
from .functions import sigmoid
from .memory import (
    atomic_or,
    float32_at,
    int8_at,
    int32_at,
    int64_at,
    record,
    record_pointer,
)
from .operation import operation
from .panels import AHEAD_BETWEEN, AHEAD_ONE, LANES, WIDE, WIDTH, integer_panels
from .panels_float import float_panel
from .places import cache_sizes
from .team import SCRATCH, TILED, begin, chunk, member_words, work_at

FLOAT, ADD, SUMS, GATED = range(4)
CHUNK = 66                      # tokens that are multiplied at a time
BATCH = 8                       # panels that few tokens are multiplied with before anything is done with the totals
LIMIT_BITS, OUTPUT_BITS = (BLOCK_LIMIT * FIXED).view(np.int32), OUTPUT_LIMIT.view(np.int32)

# One matrix: kernel weights, the bias of its outputs (0: none), and where its outputs go, in elements from row to row.
PART = record("data", "table", "row_scales", "bias", "tile_bytes", "panel_bytes", "rows", "groups", "per_block", "out", "stride",
              "columns", "block")
PRODUCT = record("team", "status", "work", "tokens", "activation", "parts", "count", "mode", "block_panels", "gated", "following")


@intrinsic
def part_at(typing_context, where):
    """A pointer to PART records."""
    return record_pointer(PART)


@intrinsic
def product_at(typing_context, where):
    """A pointer to PRODUCT records."""
    return record_pointer(PRODUCT)


def scratch_bytes() -> int:
    """Scratch that a thread needs: the totals of two panels, and weights that were decoded."""
    return 2 * CHUNK * WIDTH * 8 + panels_wide.SCRATCH_BYTES


@cache
def block_panels(tile_bytes: int) -> int:
    """Panels that take a quarter of the second-level cache: they are multiplied by a chunk of tokens, then by the next."""
    return max(1, cache_sizes().l2 // (8 * tile_bytes))


@njit(cache=True)
def _clear(totals, count):
    for i in range(count):
        totals[i] = 0


def _totals(kind, part, panel, count, activation, first, rows, totals, following, decoded):
    """int64 totals [count, rows, 32] of some panels of one part for rows first … of the activations, of which count * rows are at
    most CHUNK.

    Addresses: ``following`` of the weights that are read next, ``decoded`` of scratch for weights. Returns whether a block was
    out of range.
    """


@overload(_totals)
def _totals_of_kind(kind, part, panel, count, activation, first, rows, totals, following, decoded):
    if isinstance(kind, coded.Kind):
        return lambda kind, part, panel, count, activation, first, rows, totals, following, decoded: _integer_totals(
            kind, part, panel, count, activation, first, rows, totals, following, decoded)
    return lambda kind, part, panel, count, activation, first, rows, totals, following, decoded: _float_totals(
        kind, part, panel, count, activation, first, rows, totals)


@njit(cache=True)
def _integer_totals(kind, part, panel, count, activation, first, rows, totals, following, decoded):
    _clear(int64_at(totals), count * rows * WIDTH)
    given = (int8_at(part.data), coded.load_table(kind, int8_at(part.table)), part.groups, part.per_block, int8_at(activation.x),
             float32_at(activation.scales), int32_at(activation.corrections), activation.capacity, int64_at(totals))
    tiles = min(2 * count, (part.rows + LANES - 1) // LANES - 2 * panel)
    largest = integer_panels(kind, given, panel * part.panel_bytes, part.tile_bytes, tiles, first, rows,
                             part.row_scales + 4 * panel * WIDTH, following - part.data, decoded, int8.no_bits())
    return not int8.all_below(largest, LIMIT_BITS)


@njit(cache=True)
def _float_totals(kind, part, panel, count, activation, first, rows, totals):
    _clear(int64_at(totals), count * rows * WIDTH)
    data, x = coded.elements_at(kind, part.data), float32_at(activation.values)
    tile, largest = LANES * part.columns, int8.no_bits()
    for number in range(panel, panel + count):
        at = 2 * number * tile
        other = at + tile if (2 * number + 1) * LANES < part.rows else at
        largest = float_panel(data, at, other, part.columns, part.block, x, activation.stride, first, rows, simd.splat(FIXED),
                              int64_at(totals), largest)
        totals += 8 * rows * WIDTH
    return not int8.all_below(largest, LIMIT_BITS)


@njit(cache=True)
def _outputs(part, panel, mode, first, rows, totals):
    """Moves totals [rows, 32] of a panel to their place; returns OUT_OF_RANGE or 0."""
    column = panel * WIDTH
    count, sums, status = min(WIDTH, part.rows - column), int64_at(totals), 0
    if mode == SUMS:
        out = int64_at(part.out)
        for r in range(rows):
            for i in range(count):
                out[(first + r) * part.stride + column + i] = sums[r * WIDTH + i]
        return status
    if count == WIDTH:
        return _whole_outputs(int64_at(totals), float32_at(part.out), float32_at(part.bias), part.bias != 0, mode == ADD,
                              first * part.stride + column, part.stride, column, rows)
    out, bias = float32_at(part.out), float32_at(part.bias)
    for r in range(rows):
        at = (first + r) * part.stride + column
        for i in range(count):
            y = np.float32(np.float64(sums[r * WIDTH + i]) * UNFIXED)
            if not abs(y) < OUTPUT_LIMIT:
                status = OUT_OF_RANGE
            if part.bias:
                y += bias[column + i]
            out[at + i] = out[at + i] + y if mode == ADD else y
    return status


@njit(cache=True)
def _whole_outputs(totals, out, bias, biased, adds, at, stride, column, rows):
    """All 32 outputs of a panel for each row, from out[at] on."""
    largest = int8.no_bits()
    for r in range(rows):
        for part in range(0, WIDTH, LANES):
            y = int8.finished(totals, r * WIDTH + part)
            largest = int8.raise_bits(largest, y)
            if biased:
                y = simd.add(y, simd.load(bias, column + part))
            if adds:
                y = simd.add(simd.load(out, at + r * stride + part), y)
            simd.store(out, at + r * stride + part, y)
    return 0 if int8.all_below(largest, OUTPUT_BITS) else OUT_OF_RANGE


@njit(cache=True)
def _gated(gate, up, panel, first, rows, totals, target):
    """silu(gate) * up of a panel, from totals [rows, 32] of either, into the activations ``target``; a status as ``_panel``'s."""
    column = panel * WIDTH
    status, gates, ups = 0, totals, totals + 8 * CHUNK * WIDTH
    biases = gate.bias + 4 * column if gate.bias else 0, up.bias + 4 * column if up.bias else 0
    if not _floats_in_place(int64_at(gates), float32_at(gates), float32_at(biases[0]), biases[0] != 0, rows):
        status |= OUT_OF_RANGE
    if not _floats_in_place(int64_at(ups), float32_at(ups), float32_at(biases[1]), biases[1] != 0, rows):
        status |= OUT_OF_RANGE << 2
    count = min(WIDTH, gate.rows - column)
    for r in range(rows):
        _silu_multiply(carray(float32_at(gates + 4 * WIDTH * r), WIDTH), carray(float32_at(ups + 4 * WIDTH * r), WIDTH),
                       float32_at(target.values + 4 * ((first + r) * target.stride + column)), count)
        if target.x:
            status |= quantize_group(target, first + r, panel) << 4
    return status


@njit(cache=True)
def _floats_in_place(totals, values, bias, biased, rows):
    """Totals [rows, 32] become float32 [rows, 32] at the same address, plus the bias; whether all were in range."""
    largest = int8.no_bits()
    for at in range(0, rows * WIDTH, LANES):
        y = int8.finished(totals, at)
        largest = int8.raise_bits(largest, y)
        if biased:
            y = simd.add(y, simd.load(bias, at % WIDTH))
        simd.store(values, at, y)
    return int8.all_below(largest, OUTPUT_BITS)


@njit(cache=True, error_model="numpy")
def _silu_multiply(gate, up, out, count):
    """out = (gate * sigmoid(gate)) * up (SwiGLU, Shazeer 2020)."""
    if count == WIDTH:
        for i in range(WIDTH):
            out[i] = (gate[i] * sigmoid(gate[i])) * up[i]
    else:
        for i in range(count):
            out[i] = (gate[i] * sigmoid(gate[i])) * up[i]


@njit(cache=True)
def _expect_outputs(op, part, column, first, rows):
    """Fetches the cache lines that a panel will write: rows that lie far apart, often in few sets of the caches."""
    where, stride = part.out, part.stride
    if op.mode == GATED:
        target = carray(activation_at(op.gated), 1)[0]
        where, stride = target.values, target.stride
    size = 8 if op.mode == SUMS else 4
    out = int8_at(where)
    for r in range(rows):
        for line in range(0, WIDTH * size, coded.BYTES):
            coded.prefetch_to_write(out, ((first + r) * stride + column) * size + line)


@njit(cache=True)
def _following(op, parts, number, panel):
    """Where the weights behind a panel of a part are read from next: its next panel, the other of gate and up, the next part, or
    the first part of the next product."""
    part = parts[number]
    if op.mode == GATED and number == 0:
        return parts[1].data + panel * parts[1].panel_bytes
    if (panel + 1) * WIDTH < part.rows:
        own = parts[0] if op.mode == GATED else part
        return own.data + (panel + 1) * own.panel_bytes
    return parts[number + 1].data if number + 1 < op.count else op.following


@njit(cache=True)
def _ask_for(where):
    """Asks for weights behind those that are on their way, for the time until some are multiplied again."""
    for line in range(0, AHEAD_BETWEEN, coded.BYTES):
        coded.prefetch_to_read(int8_at(where), line)


@njit(cache=True)
def _panels(kind, op, activation, parts, panel, last, first, rows, scratch):
    """Some panels from ``panel`` on, of one part, not beyond ``last``, for rows first … of the activations.

    Returns a status with two bits a part (q, k, v, or gate, up and what they gate), and the panel behind them.
    """
    status, number, local, size, decoded = 0, 0, panel, rows * WIDTH * 8, scratch + 2 * CHUNK * WIDTH * 8
    while op.mode != GATED and local >= (parts[number].rows + WIDTH - 1) // WIDTH:
        local -= (parts[number].rows + WIDTH - 1) // WIDTH
        number += 1
    count = min(BATCH, CHUNK // rows, last - panel, (parts[number].rows + WIDTH - 1) // WIDTH - local) if rows < WIDE else 1
    if rows >= WIDE:
        _expect_outputs(op, parts[number], local * WIDTH, first, rows)
    if op.mode == GATED:
        for i in range(2 * count):
            each, at = i % 2, scratch + i % 2 * CHUNK * WIDTH * 8 + i // 2 * size
            following = _following(op, parts, each, local + i // 2)
            beyond = _totals(kind, parts[each], local + i // 2, 1, activation, first, rows, at, following, decoded)
            status |= OUT_OF_RANGE << (2 * each) if beyond else 0
    else:
        following = _following(op, parts, number, local + count - 1)
        beyond = _totals(kind, parts[number], local, count, activation, first, rows, scratch, following, decoded)
        status = OUT_OF_RANGE << (2 * number) if beyond else 0
    if rows < WIDE:
        _ask_for(following + AHEAD_ONE)
    for i in range(count):
        at = scratch + i * size
        if op.mode == GATED:
            status |= _gated(parts[0], parts[1], local + i, first, rows, at, carray(activation_at(op.gated), 1)[0])
        else:
            status |= _outputs(parts[number], local + i, op.mode, first, rows, at) << (2 * number)
    return status, panel + count


@njit(cache=True)
def panels_of(op, parts):
    """Panels of a product: those of all parts, or pairs of gate and up."""
    count = 0
    for i in range(1 if op.mode == GATED else op.count):
        count += (parts[i].rows + WIDTH - 1) // WIDTH
    return count


@njit(cache=True)
def _product(kind, member, where):
    """The body of a product: shares panels, with ``tiled`` blocks of panels x tokens, among the team.

    Three levels of blocks: a chunk of tokens whose totals and activations of a unit the first-level cache holds, as many panels
    as the second level holds, and what a member is handed.
    """
    op = carray(product_at(where), 1)[0]
    activation, work = carray(activation_at(op.activation), 1)[0], carray(work_at(op.work), 1)[0]
    parts, rows = carray(part_at(op.parts), 8), int64_at(op.tokens)[0]
    panels, scratch = panels_of(op, parts), int64_at(member_words(op.team, member))[SCRATCH]
    tiled = work.schedule == TILED
    wide, tall = max(1, work.tile_rows // WIDTH) if tiled else 1, max(1, min(work.tile_tokens if tiled else rows, rows))
    bands, strips = (panels + wide - 1) // wide, (rows + tall - 1) // tall
    begin(op.team, member, work, bands * strips)
    status = 0
    first, last = chunk(op.team, member, work, bands * strips)
    while last > first:
        if tiled:
            for task in range(first, last):
                band, strip = task // strips, task % strips
                status |= _block(kind, op, activation, parts, band * wide, min((band + 1) * wide, panels), strip * tall,
                                 min((strip + 1) * tall, rows), scratch)
        else:
            for start in range(first, last, op.block_panels):
                # Not a bare 0: Numba would compile the function again for a literal.
                stop = min(start + op.block_panels, last)
                status |= _block(kind, op, activation, parts, start, stop, np.int64(0), rows, scratch)
        first, last = chunk(op.team, member, work, bands * strips)
    if status:
        atomic_or(op.status, status)


@njit(cache=True)
def _block(kind, op, activation, parts, first, last, start, stop, scratch):
    """Panels first … last - 1 for rows start … stop - 1, chunk by chunk."""
    status = 0
    for row in range(start, stop, CHUNK):
        panel = first
        while panel < last:
            found, panel = _panels(kind, op, activation, parts, panel, last, row, min(CHUNK, stop - row), scratch)
            status |= found
    return status


@operation
def codes_product(member, where):
    """Products of weights of the kind ``codes``."""
    _product(coded.kind("codes"), member, where)


@operation
def bytes_product(member, where):
    """Products of weights of the kind ``bytes``."""
    _product(coded.kind("bytes"), member, where)


@operation
def halves_product(member, where):
    """Products of weights of the kind ``halves``."""
    _product(coded.kind("halves"), member, where)


@operation
def nibble_product(member, where):
    """Products of weights of the kind ``nibble``."""
    _product(coded.kind("nibble"), member, where)


@operation
def float32_product(member, where):
    """Products of float32 weights; activations are not quantised."""
    _product(coded.kind("f32"), member, where)


@operation
def float16_product(member, where):
    """Products of float16 weights; activations are not quantised."""
    _product(coded.kind("f16"), member, where)
