"""Weights as the kernels of this process hold them: room for a format, filled row by row.

Panels of 32 rows are two tiles of 16. ``simd_weights`` describes the bytes of a tile of quantised weights; float32 and float16
ones are interleaved [columns, 16].
"""

from dataclasses import dataclass, field

import numpy as np
from numba import njit

from ..formats import CODEBOOK_SIZE, PAIRS, Blocks, Packed, unpack_codes
from ..numerics import GROUP
from . import target
from .memory import address, aligned, uint8_at
from .placement import touch
from .products import PART
from .simd_weights import BYTES, KINDS, PAIR_ORDER, STEPS
from .workers import PANEL, Pool, WorkDistribution

LANES = 16
_ORDER = np.array(PAIR_ORDER)


@dataclass(frozen=True, eq=False)
class Weights:
    """``rows`` x ``blocks.size`` weights. ``layout``: ``codes``, ``bytes``, ``halves``, ``nibble``, ``f32`` or ``f16``.

    ``data``: int8 [panels, 2, bytes of a tile] (between panels may lie those of another matrix), or float32 or uint16 [panels, 2,
    columns, 16]; ``row_scales`` float32 [panels * 32]; ``table`` int8 [256]: the codebook of ``codes`` offset by 128, first
    values of the pairs first.
    """

    layout: str
    rows: int
    blocks: Blocks
    data: np.ndarray
    row_scales: np.ndarray
    table: np.ndarray | None = None
    codebook: np.ndarray | None = field(default=None, repr=False)

    @property
    def quantized(self) -> bool:
        """Whether products multiply integers."""
        return self.layout in KINDS

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.data, self.row_scales, self.table) if array is not None)

    def part(self, out: np.ndarray | None = None, bias: np.ndarray | None = None) -> "Part":
        """These weights, the bias of their outputs (None or empty: none), and the array [rows, outputs] that takes them."""
        stride = 0 if out is None else out.shape[1]
        # Whole panels of a bias: kernels load it sixteen at a time.
        bias = None if bias is None or not bias.size else np.concatenate([bias, np.zeros(-len(bias) % (2 * LANES), np.float32)])
        record = np.array([(address(self.data), address(self.table), address(self.row_scales), address(bias),
                            *self.data.strides[1::-1], self.rows, self.blocks.groups, self.blocks.groups_per_block,
                            address(out), stride, self.blocks.size, self.blocks.block)], PART)
        return Part(record, (self, out, bias))


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a product: a record PART, and the arrays whose addresses it holds."""

    record: np.ndarray
    arrays: tuple


def layout_of(weights_format: str) -> str:
    """How this process holds a weight format: ``q3_5`` as codes where looking them up is one instruction, else as bytes."""
    if weights_format == "q3_5":
        return "codes" if target.kernels() == "vbmi" else "bytes"
    return {"q8": "halves", "q4": "nibble"}.get(weights_format, weights_format)


def allocate(weights_format: str, rows: int, blocks: Blocks, codebook=None, pool: Pool | None = None,
             work: WorkDistribution | None = None) -> Weights:
    """Room for ``rows`` rows of weights in a format (``q3_5``: with its codebook), to be given to ``fill``.

    With a pool its threads touch the memory first, as ``work.numa`` says (default local: each what it will read of a product with
    schedule ``static``, or first with ``steal``).
    """
    layout = layout_of(weights_format)
    if layout in KINDS:
        data = _zeros(_panels(rows), 2, KINDS[layout].tile_bytes(blocks.groups), pool, work)
        return _weights(layout, rows, blocks, data, codebook)
    dtype = np.dtype(np.float32 if layout == "f32" else np.uint16)
    data = _zeros(_panels(rows), 2, blocks.size * LANES * dtype.itemsize, pool, work).view(dtype)
    return _weights(layout, rows, blocks, data.reshape(_panels(rows), 2, blocks.size, LANES))


def allocate_pair(weights_format: str, rows: int, blocks: Blocks, codebooks=(None, None), pool: Pool | None = None,
                  work: WorkDistribution | None = None) -> list[Weights]:
    """Room for the gate and up of one product (mode GATED): panels of quantised weights alternate in memory, as they are read."""
    layout = layout_of(weights_format)
    if layout not in KINDS:
        return [allocate(weights_format, rows, blocks, codebook, pool, work) for codebook in codebooks]
    data = _zeros(_panels(rows), 4, KINDS[layout].tile_bytes(blocks.groups), pool, work)
    return [_weights(layout, rows, blocks, data[:, first : first + 2], codebook)
            for first, codebook in zip((0, 2), codebooks, strict=True)]


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


def _weights(layout: str, rows: int, blocks: Blocks, data: np.ndarray, codebook=None) -> Weights:
    scales = np.full(len(data) * PANEL, 0 if layout in KINDS else 1, np.float32)
    table = None
    if layout == "codes":
        table = aligned(2 * CODEBOOK_SIZE, np.int8)
        table[:] = (codebook.astype(np.int16) + 128).astype(np.uint8).T.reshape(-1).view(np.int8)
    return Weights(layout, rows, blocks, data, scales, table, codebook)


def _zeros(panels: int, tiles: int, tile_bytes: int, pool: Pool | None, work: WorkDistribution | None) -> np.ndarray:
    """int8 zeros [panels, tiles of a panel, tile_bytes]."""
    data = aligned((panels, tiles, tile_bytes), np.int8, 0 if pool is None else None)
    if pool is not None and data.size:
        touch(pool, data, tiles * tile_bytes, (work or WorkDistribution()).numa)
    return data


def allocated_bytes(weights_format: str, rows: int, blocks: Blocks) -> int:
    """``nbytes`` of what ``allocate`` would give."""
    layout, tiles = layout_of(weights_format), 2 * _panels(rows)
    if layout not in KINDS:
        return tiles * LANES * ((4 if layout == "f32" else 2) * blocks.size + 4)
    table = 2 * CODEBOOK_SIZE if layout == "codes" else 0
    return tiles * (KINDS[layout].tile_bytes(blocks.groups) + 4 * LANES) + table


def fill(weights: Weights, first_row: int, part: np.ndarray | Packed) -> None:
    """Stores float32 or float16 (uint16) rows, or packed ones, as rows first_row … of weights from ``allocate``."""
    if not weights.quantized:
        _interleave(np.ascontiguousarray(part), weights.data, first_row)
        return
    kind, strides = KINDS[weights.layout], weights.data.strides
    data = address(weights.data), strides[0], strides[1]
    if weights.layout == "codes":
        _place_codes(unpack_codes(part.codes), *data, first_row)
    elif weights.layout == "nibble":
        _place_nibbles(part.unpack()[0], *data, first_row)
    else:
        _place_bytes(part.unpack()[0], *data, first_row, kind.line_pairs)
    if kind.indexed:
        _place_indices(part.scales, *data, first_row, kind.vectors)
        weights.row_scales[first_row : first_row + part.n] = part.row_scales.view(np.float16)
    else:
        _place_halves(part.scales.view(np.uint16), *data, first_row, kind.vectors)
        weights.row_scales[first_row : first_row + part.n] = 1


@njit(cache=True)
def _interleave(part, data, first_row):
    for i in range(part.shape[0]):
        row = first_row + i
        for k in range(part.shape[1]):
            data[row // PANEL, row // LANES % 2, k, row % LANES] = part[i, k]


@njit(cache=True)
def _tile(data, panel_bytes, tile_bytes, row):
    """The bytes of the tile that holds a row, and the row's lane."""
    return uint8_at(data + row // PANEL * panel_bytes + row // LANES % 2 * tile_bytes), row % LANES


@njit(cache=True)
def _pair_at(pair, vectors, line_pairs):
    """Where the weights of a pair of groups start in a tile."""
    return (pair * vectors + pair // line_pairs + 1) * BYTES


@njit(cache=True)
def _place_codes(codes, data, panel_bytes, tile_bytes, first_row):
    """Codes [n, groups, 16]: of the eight vectors of a pair of groups seven as they are, the last in their highest bits."""
    for i in range(codes.shape[0]):
        tile, lane = _tile(data, panel_bytes, tile_bytes, first_row + i)
        for group in range(codes.shape[1]):
            at = _pair_at(group // 2, 7, 4)
            for p in range(PAIRS):
                vector, place = group % 2 * 4 + p // 4, lane * 4 + p % 4
                code = codes[i, group, p]
                if vector < 7:
                    tile[at + vector * BYTES + place] |= code
                else:
                    for bit in range(7):
                        tile[at + bit * BYTES + place] |= ((code >> bit) & 1) << 7


@njit(cache=True)
def _step(k):
    """Step and place in its four bytes of the k-th weight of a group."""
    return k // 8 * 2 + k % 2, k % 8 // 2


@njit(cache=True)
def _place_bytes(values, data, panel_bytes, tile_bytes, first_row, line_pairs):
    """int8 values [n, groups, 32], offset by 128; a group that only completes a pair keeps zero bytes."""
    for i in range(values.shape[0]):
        tile, lane = _tile(data, panel_bytes, tile_bytes, first_row + i)
        for group in range(values.shape[1]):
            at = _pair_at(group // 2, 2 * STEPS, line_pairs) + group % 2 * STEPS * BYTES
            for k in range(GROUP):
                step, place = _step(k)
                tile[at + step * BYTES + lane * 4 + place] = np.int32(values[i, group, k]) + 128


@njit(cache=True)
def _place_nibbles(values, data, panel_bytes, tile_bytes, first_row):
    """int8 values -8 … 7 [n, groups, 32], offset by 8; the low four bits belong to even steps."""
    for i in range(values.shape[0]):
        tile, lane = _tile(data, panel_bytes, tile_bytes, first_row + i)
        for group in range(values.shape[1]):
            at = _pair_at(group // 2, STEPS, 1) + group % 2 * (STEPS // 2) * BYTES
            for k in range(GROUP):
                step, place = _step(k)
                nibble = np.int32(values[i, group, k]) + 8
                tile[at + step // 2 * BYTES + lane * 4 + place] |= nibble << (4 * (step % 2))


@njit(cache=True)
def _place_indices(indices, data, panel_bytes, tile_bytes, first_row, vectors):
    """4-bit factor indices [n, groups]: eight groups in a row's word of a line."""
    for i in range(indices.shape[0]):
        tile, lane = _tile(data, panel_bytes, tile_bytes, first_row + i)
        for group in range(indices.shape[1]):
            at = _pair_at(group // 8 * 4, vectors, 4) - BYTES
            tile[at + lane * 4 + group % 8 // 2] |= indices[i, group] << (4 * (group % 2))


@njit(cache=True)
def _place_halves(scales, data, panel_bytes, tile_bytes, first_row, vectors):
    """float16 factors [n, groups] as uint16: 16 rows of one group, then of the next."""
    for i in range(scales.shape[0]):
        tile, lane = _tile(data, panel_bytes, tile_bytes, first_row + i)
        for group in range(scales.shape[1]):
            at = _pair_at(group // 2, vectors, 1) - BYTES + 2 * (group % 2 * LANES + lane)
            tile[at], tile[at + 1] = scales[i, group] & 255, scales[i, group] >> 8
