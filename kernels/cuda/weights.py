"""Weights as the kernels of a device read them, laid out on the host once and uploaded. See weights.cuh for the bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..formats import Blocks, Packed, unpack_codes, unpack_int4
from ..numerics import BLOCK, GROUP

TILE = 32                       # rows that a warp multiplies together
UNIT = 8                        # groups of a unit at most: whole reduction blocks, one after the other
_LANE_BYTES = {"q3_5": 116, "q4": 144, "q8": 272}      # of a unit of a tile: codes, then factors
_PIECE = 16 << 20               # bytes that are uploaded at a time
_SLAB = 4 << 20                 # weights that are laid out at a time


@dataclass(frozen=True, eq=False)
class HostWeights:
    """Weights [rows, blocks.size] in the layout of a device: bytes ``data``, one part of a tile after the other.

    ``row_scales``: float32 [rows, whole tiles]; ``codebook``: uint16 [128], the pairs of ``q3_5``. None for f32 and f16.
    """

    format: str
    rows: int
    blocks: Blocks
    data: np.ndarray
    row_scales: np.ndarray | None = None
    codebook: np.ndarray | None = None

    def upload(self, device) -> "DeviceWeights":
        """A copy in the memory of ``device``, through pinned memory in pieces."""
        data = device.zeros(self.data.shape, np.uint8)
        buffers = [device.pinned((min(_PIECE, self.data.size),), np.uint8) for _ in range(min(2, -(-self.data.size // _PIECE)))]
        for number, first in enumerate(range(0, self.data.size, _PIECE)):
            piece, buffer = self.data[first : first + _PIECE], buffers[number % 2]
            if number > 1:
                device.synchronize()        # the buffer has been read
            buffer[: piece.size] = piece
            device.upload(buffer[: piece.size], data[first : first + piece.size])
        scales, codebook = (None if array is None else device.upload(array) for array in (self.row_scales, self.codebook))
        device.synchronize()
        return DeviceWeights(self.format, self.rows, self.blocks, data, scales, codebook)


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """``HostWeights`` on a device."""

    format: str
    rows: int
    blocks: Blocks
    data: object
    row_scales: object = None
    codebook: object = None

    @property
    def quantized(self) -> bool:
        """Whether products multiply integers."""
        return self.format in _LANE_BYTES

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.data, self.row_scales, self.codebook) if array is not None)

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE)

    @property
    def tile_bytes(self) -> int:
        return self.data.nbytes // self.tiles

    @property
    def units(self) -> int:
        """Parts of a tile that are multiplied one by one: of some reduction blocks, or of one in f32 and f16."""
        return -(-self.blocks.groups // groups_per_unit(self.blocks)) if self.quantized else self.blocks.n_blocks


def groups_per_unit(blocks: Blocks) -> int:
    """Groups of all units but the last, which may have fewer."""
    return UNIT // blocks.groups_per_block * blocks.groups_per_block


def lay_out(part: Packed | np.ndarray, blocks: Blocks | None = None) -> HostWeights:
    """A whole matrix in the layout of a device: packed, or float32 or float16 (uint16 bits) [rows, k] with their ``blocks``."""
    blocks = part.blocks if isinstance(part, Packed) else blocks or Blocks(part.shape[1], BLOCK)
    if blocks.groups_per_block > UNIT:
        raise ValueError(f"reduction blocks of {blocks.block} k: a device takes up to {UNIT * GROUP}")
    if not isinstance(part, Packed):
        data = _in_slabs(lambda rows: _floats(part[rows], blocks), len(part), blocks.size)
        return HostWeights("f32" if part.dtype == np.float32 else "f16", len(part), blocks, data)
    if part.codebook is not None and part.codebook[0].any():
        raise ValueError("the first pair of a codebook must be (0, 0): units are filled up with it")
    arrange = {"q3_5": _pairs, "q4": _nibbles, "q8": _bytes}[part.format]
    data = _in_slabs(lambda rows: arrange(part.codes[rows], part.scales[rows], blocks), part.n, blocks.size)
    scales = np.zeros(-(-part.n // TILE) * TILE, np.float32)
    scales[: part.n] = 1 if part.row_scales is None else part.row_scales.view(np.float16)
    codebook = None if part.codebook is None else np.ascontiguousarray(part.codebook).view("<u2").reshape(-1)
    return HostWeights(part.format, part.n, blocks, data, scales, codebook)


def _in_slabs(arrange: Callable[[slice], np.ndarray], rows: int, columns: int) -> np.ndarray:
    """uint8 [bytes]: what ``arrange`` makes of whole tiles, a few at a time."""
    step = max(1, _SLAB // max(1, columns * TILE)) * TILE
    out = None
    for first in range(0, rows, step):
        slab = arrange(slice(first, min(first + step, rows)))
        if out is None:
            out = np.empty((-(-rows // TILE), slab.shape[1]), np.uint8)
        out[first // TILE : first // TILE + len(slab)] = slab
    return np.zeros(0, np.uint8) if out is None else out.reshape(-1)


def _units(array: np.ndarray, blocks: Blocks) -> np.ndarray:
    """[rows, groups, …] to [tiles, 32, units, 8, …] with zeros in the gaps."""
    per_unit, rest = groups_per_unit(blocks), array.shape[2:]
    tiles, units = -(-len(array) // TILE), -(-blocks.groups // per_unit)
    whole = np.zeros((tiles * TILE, units * per_unit, *rest), array.dtype)
    whole[: len(array), : blocks.groups] = array
    out = np.zeros((tiles, TILE, units, UNIT, *rest), array.dtype)
    out[:, :, :, :per_unit] = whole.reshape(tiles, TILE, units, per_unit, *rest)
    return out


def _fragments(array: np.ndarray, blocks: Blocks) -> np.ndarray:
    """[rows, groups, n] to [tiles, units, lanes, groups, 2, 2, 2, n / 8]: half tile, half of eight k, half of a half tile.

    Lane 4 g + t has rows g, g + 8, g + 16 and g + 24, of each group the k from 8 t to 8 t + 7.
    """
    parts = _units(array, blocks)
    tiles, _, units, _, n = parts.shape
    parts = parts.reshape(tiles, 2, 2, 8, units, UNIT, 4, 2, n // 8)
    return parts.transpose(0, 4, 3, 6, 5, 1, 7, 2, 8).reshape(tiles, units, TILE, UNIT, 2, 2, 2, n // 8)


def _vectors(lanes: np.ndarray) -> np.ndarray:
    """[tiles, units, lanes, bytes] to [tiles, units, bytes of 32 lanes]: 16 bytes of every lane, then the next 16."""
    tiles, units = lanes.shape[:2]
    return lanes.reshape(tiles, units, TILE, -1, 16).swapaxes(2, 3).reshape(tiles, units, -1)


def _by_lane(scales: np.ndarray, blocks: Blocks) -> np.ndarray:
    """[rows, groups] to [tiles, units, lanes, 8]: to lane 4 g + t belongs row g + 8 t."""
    parts = _units(scales, blocks)
    return parts.reshape(len(parts), 4, 8, -1, UNIT).transpose(0, 3, 2, 1, 4).reshape(len(parts), -1, TILE, UNIT)


def _joined(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """[tiles, bytes] from the two sections of each unit."""
    codes, factors = _vectors(codes), np.ascontiguousarray(factors).view(np.uint8).reshape(*codes.shape[:2], -1)
    return np.concatenate([codes, factors], 2).reshape(len(codes), -1)


def _pairs(codes: np.ndarray, scales: np.ndarray, blocks: Blocks) -> np.ndarray:
    words = _fragments(unpack_codes(codes), blocks)
    # Of each two groups: eight words of four codes. The last one's bits go to the lowest bits of the bytes of the others.
    words = words.reshape(*words.shape[:3], UNIT // 2, 8, 4)
    spare = words[..., 7:, :] >> np.arange(7, dtype=np.uint8)[:, None] & 1
    lanes = (words[..., :7, :] << 1 | spare).reshape(*words.shape[:3], -1)
    factors = _by_lane(scales, blocks)
    return _joined(lanes, factors[..., ::2] | factors[..., 1::2] << 4)


def _nibbles(codes: np.ndarray, scales: np.ndarray, blocks: Blocks) -> np.ndarray:
    values = _fragments(unpack_int4(codes).view(np.uint8), blocks)
    lanes = (values[..., 0, :] << 4 | values[..., 1, :] & 15).reshape(*values.shape[:3], -1)
    return _joined(lanes, _by_lane(scales, blocks))


def _bytes(codes: np.ndarray, scales: np.ndarray, blocks: Blocks) -> np.ndarray:
    values = _fragments(codes.view(np.uint8), blocks)
    return _joined(values.reshape(*values.shape[:3], -1), _by_lane(scales, blocks))


def _floats(values: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Blocks are filled up to whole vectors of 16 bytes; lane l has row l."""
    count = 16 // values.itemsize
    tiles, size = -(-len(values) // TILE), -(-min(blocks.block, blocks.size) // count) * count
    whole, rest = divmod(blocks.size, blocks.block)
    length = whole * size + -(-rest // count) * count
    out = np.zeros((tiles * TILE, length), values.dtype)
    k = np.arange(blocks.size)
    out[: len(values), k // blocks.block * size + k % blocks.block] = values
    out = np.ascontiguousarray(out.reshape(tiles, TILE, -1, count).swapaxes(1, 2))
    return out.view(np.uint8).reshape(tiles, -1)
