"""Weight formats: how quantised weights [N, K] are cut into groups, held in memory and laid out as bytes.

A weight is value x factor x row scale: an int8 value, a factor for each group of 32 consecutive k, and for ``q3_5``
one float16 scale a row. ``q8`` and ``q4`` store the values, of 8 and 4 bits, and a float16 factor a group. ``q3_5``
stores pairs: two neighbouring weights share one 7-bit index into the tensor's codebook of 128 pairs, and a group's
factor is a 4-bit index into ``FACTORS``. Groups start afresh in each reduction block, and gaps at block ends hold zeros.
``f16`` and ``f32`` are plain arrays [N, K] without groups.

Canonical bytes, row order, little-endian, whatever the layout of the program that made them:

- ``q8``: int8 values [N, groups, 32], then float16 factors [N, groups];
- ``q4``: nibbles [N, groups, 16], a value -8 … 7 as value + 8, that of an even k in the low and that of the odd k
  behind it in the high four bits of a byte; then float16 factors [N, groups], of either sign;
- ``q3_5``: int8 codebook [128, 2], float16 row scales [N], factor indices [N, ceil(groups / 2)] (the even group in the
  low four bits; the high four bits of an odd row's last byte are zero), codes [N, groups, 14].
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .numerics import GROUP

PAIRS = GROUP // 2              # pairs of weights in a group
CODE_BITS = 7
CODE_BYTES = PAIRS * CODE_BITS // 8
CODEBOOK_SIZE = 1 << CODE_BITS
NIBBLE_ZERO = 8                 # the nibble of value 0 in q4
# The largest magnitude that a format can hold; f16 numbers and the scales of quantised formats are float16. The value
# +8 does not exist in q4.
LARGEST_WEIGHT = {"q8": 127 * 65504, "q4": 7 * 65504, "q3_5": 127 * 65504, "f16": 65504}
# Eight 7-bit fields are seven bytes. They become bytes in three steps, each of which parts fields in two: a mask of the
# lower halves, one of the upper halves, and how far these move.
_SPREAD = tuple((np.uint64(low), np.uint64(high), np.uint64(shift)) for low, high, shift in (
    (0x000000000FFFFFFF, 0x00FFFFFFF0000000, 4),
    (0x00003FFF00003FFF, 0x0FFFC0000FFFC000, 2),
    (0x007F007F007F007F, 0x3F803F803F803F80, 1),
))

# (-1)**j * 2**(0.2 - 0.055 j - 0.005 j**2). The steps are finest where most groups lie, a little below the row's
# maximum, and reach a quarter of it for rows with outliers. The alternating sign makes the codebook and its mirror
# image two choices for each size: neighbouring factors are then two independent tries, worth a tenth of the error.
FACTORS = np.array([
    1.148698354997, -1.101905115877, 1.049716683623, -0.993092495437,
    0.933032991537, -0.870550563296, 0.806641759222, -0.742261785315,
    0.678302163724, -0.615572206672, 0.554784736034, -0.496546247719,
    0.441351498145, -0.389582289830, 0.341510064189, -0.297301778751,
], np.float32)


@dataclass(frozen=True)
class QuantizedKind:
    """A weight format: bytes of a group's codes, bits of its factor, bits of a row's scale, bytes of the codebook."""

    name: str
    code_bytes: int
    factor_bits: int
    row_bits: int
    codebook_bytes: int


FORMATS = {kind.name: kind for kind in (
    QuantizedKind("q8", GROUP, 16, 0, 0),
    QuantizedKind("q4", GROUP // 2, 16, 0, 0),
    QuantizedKind("q3_5", CODE_BYTES, 4, 16, 2 * CODEBOOK_SIZE),
)}
PLAIN_BYTES = {"f32": 4, "f16": 2}      # of a weight, in formats without groups


def table_format(weights_format: str, name: str = "embedding") -> str:
    """The format of ``embedding`` or ``head`` in a model of a format.

    Quantised models keep the embedding in ``q8``, which is the head too where they are tied. A head of its own, all of which is
    read for every token, is ``q4`` in models of 4 bits and less.
    """
    if weights_format in PLAIN_BYTES:
        return weights_format
    return "q4" if name == "head" and weights_format in ("q3_5", "q4") else "q8"


@dataclass(frozen=True)
class Blocks:
    """``size`` k cut into reduction blocks of ``block`` k, each into groups of 32; the last of each may be shorter."""

    size: int
    block: int

    def __post_init__(self):
        if self.size < 0 or self.block < 1:
            raise ValueError(f"{self.size} k in blocks of {self.block}: the size must be >= 0 and the block >= 1")

    @property
    def n_blocks(self) -> int:
        return -(-self.size // self.block)

    @property
    def groups_per_block(self) -> int:
        return -(-self.block // GROUP)

    @property
    def groups(self) -> int:
        """Groups of all blocks."""
        whole, rest = divmod(self.size, self.block)
        return whole * self.groups_per_block + -(-rest // GROUP)

    @property
    def padded(self) -> int:
        """k with the gaps: 32 for each group."""
        return self.groups * GROUP

    @cached_property
    def _positions(self) -> np.ndarray:
        k = np.arange(self.size)
        return k // self.block * (self.groups_per_block * GROUP) + k % self.block

    def pad(self, array: np.ndarray) -> np.ndarray:
        """[..., size] to [..., groups, 32], zeros in the gaps."""
        array = np.asarray(array)
        if array.shape[-1:] != (self.size,):
            raise ValueError(f"the last axis of shape {array.shape} must be {self.size} k long")
        out = np.zeros((*array.shape[:-1], self.padded), array.dtype)
        out[..., self._positions] = array
        return out.reshape(*array.shape[:-1], self.groups, GROUP)

    def unpad(self, array: np.ndarray) -> np.ndarray:
        """[..., groups, 32] to [..., size]: the inverse of ``pad``."""
        if array.shape[-2:] != (self.groups, GROUP):
            raise ValueError(f"the last axes of shape {array.shape} must be {self.groups} groups of {GROUP}")
        return array.reshape(*array.shape[:-2], self.padded)[..., self._positions]


def pack_codes(indices: np.ndarray) -> np.ndarray:
    """uint8 [..., 16] indices below 128 to uint8 [..., 14]: little-endian 7-bit fields, pair 0 in the lowest bits."""
    indices = np.asarray(indices)
    words = np.ascontiguousarray(indices, np.uint8).reshape(-1).view("<u8")
    for low, high, shift in reversed(_SPREAD):
        words = words & low | words >> shift & high
    return words.view(np.uint8).reshape(-1, 8)[:, :CODE_BITS].reshape(*indices.shape[:-1], CODE_BYTES)


def unpack_codes(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 14] to uint8 [..., 16] indices: the inverse of ``pack_codes``."""
    eighths = codes.reshape(-1, CODE_BITS)
    words = np.zeros((len(eighths), 8), np.uint8)
    words[:, :CODE_BITS] = eighths
    words = words.view("<u8")
    for low, high, shift in _SPREAD:
        words = words & low | (words & high) << shift
    return words.view(np.uint8).reshape(*codes.shape[:-1], PAIRS)


def pack_int4(values: np.ndarray) -> np.ndarray:
    """int8 [..., 32] of -8 … 7 to nibbles uint8 [..., 16] (order: see the module)."""
    nibbles = (values + np.int8(NIBBLE_ZERO)).view(np.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack_int4(nibbles: np.ndarray) -> np.ndarray:
    """uint8 [..., 16] to int8 [..., 32]: the inverse of ``pack_int4``."""
    values = np.empty((*nibbles.shape[:-1], GROUP), np.int8)
    values[..., ::2], values[..., 1::2] = nibbles & 15, nibbles >> 4
    return values - np.int8(NIBBLE_ZERO)


def _pack_nibbles(indices: np.ndarray) -> np.ndarray:
    n, groups = indices.shape
    even = np.zeros((n, groups + groups % 2), np.uint8)
    even[:, :groups] = indices
    return even[:, ::2] | even[:, 1::2] << 4


@dataclass(frozen=True, eq=False)
class Packed:
    """Quantised weights [n, blocks.size], or a shard of them cut at rows or at reduction blocks.

    ``codes``: q8 int8 [n, groups, 32], q4 uint8 [n, groups, 16], q3_5 uint8 [n, groups, 14]. ``scales``: q8 and q4
    float16 bits as uint16 [n, groups], q3_5 uint8 [n, groups] indices into ``FACTORS``. ``row_scales``: q3_5 float16
    bits as uint16 [n]. ``codebook``: q3_5 int8 [128, 2]. The last two are None for q8 and q4.
    """

    format: str
    n: int
    blocks: Blocks
    codes: np.ndarray
    scales: np.ndarray
    row_scales: np.ndarray | None = None
    codebook: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Length of ``bytes()``."""
        return packed_bytes(self.format, self.n, self.blocks)

    def bytes(self) -> bytes:
        """The canonical bytes (layout: see the module), independent of how the tensor was cut when it was made."""
        if self.codebook is None:
            parts = self.codes, self.scales.astype("<u2")
        else:
            parts = self.codebook, self.row_scales.astype("<u2"), _pack_nibbles(self.scales), self.codes
        return b"".join(part.tobytes() for part in parts)

    def rows(self, first: int) -> "Packed":
        """The same without its first rows."""
        scales = None if self.row_scales is None else self.row_scales[first:]
        return replace(self, n=self.n - first, codes=self.codes[first:], scales=self.scales[first:], row_scales=scales)

    def sha256(self) -> str:
        """Hexadecimal SHA-256 over a line ``format n size block`` and the canonical bytes."""
        digest = hashlib.sha256(f"{self.format} {self.n} {self.blocks.size} {self.blocks.block}\n".encode())
        digest.update(self.bytes())
        return digest.hexdigest()

    def bits_per_weight(self) -> float:
        """Bits all in (codes, factors, row scales, codebook, padding) for each of the n x size weights."""
        return 8 * self.nbytes / (self.n * self.blocks.size)

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int8 values [n, groups, 32], float32 factors [n, groups] of either sign, float32 row scales [n].

        A weight is value x factor x row scale. Values lie within -127 … 127. Behind a block's last k they are whatever
        completes its last pair, to be met by zero activations.
        """
        if self.codebook is None:
            values = self.codes if self.format == "q8" else unpack_int4(self.codes)
            return values, self.scales.view(np.float16).astype(np.float32), np.ones(self.n, np.float32)
        pairs = self.codebook.view(np.uint16)[:, 0][unpack_codes(self.codes)]
        values = pairs.view(np.int8).reshape(self.n, self.blocks.groups, GROUP)
        return values, FACTORS[self.scales], self.row_scales.view(np.float16).astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """float32 [n, size]: (value x factor) x row scale, each product rounded to float32."""
        values, factors, row_scales = self.unpack()
        return self.blocks.unpad(values.astype(np.float32) * factors[:, :, None] * row_scales[:, None, None])


def packed_bytes(name: str, n: int, blocks: Blocks) -> int:
    """Canonical bytes of [n, blocks.size] weights in the format ``name``, ``f16`` and ``f32`` included."""
    if name in PLAIN_BYTES:
        return n * blocks.size * PLAIN_BYTES[name]
    kind, groups = FORMATS[name], blocks.groups
    row = groups * kind.code_bytes + -(-groups * kind.factor_bits // 8) + kind.row_bits // 8
    return n * row + kind.codebook_bytes


def concatenate(parts: Sequence[Packed], axis: int) -> Packed:
    """One tensor from shards of it, in order: of rows (axis 0) or of columns cut at reduction blocks (axis 1).

    Raises ValueError where the shards are not of one tensor: different formats, blocks, codebooks or row scales.
    """
    first = parts[0]
    for part in parts:
        if part.format != first.format or part.blocks.block != first.blocks.block:
            raise ValueError("shards of one tensor have one format and one block size, not "
                             f"{first.format}/{first.blocks.block} and {part.format}/{part.blocks.block}")
        if not _equal(part.codebook, first.codebook):
            raise ValueError("shards of one tensor have one codebook")
    codes = np.concatenate([part.codes for part in parts], axis)
    scales = np.concatenate([part.scales for part in parts], axis)
    if axis == 0:
        if any(part.blocks != first.blocks for part in parts):
            raise ValueError(f"row shards have one number of k, not {sorted({part.blocks.size for part in parts})}")
        rows = None if first.row_scales is None else np.concatenate([part.row_scales for part in parts])
        return replace(first, n=len(codes), codes=codes, scales=scales, row_scales=rows)
    if not all(_equal(part.row_scales, first.row_scales) for part in parts):
        raise ValueError("column shards of one tensor have the same row scales: combine the row maxima of all shards")
    sizes = [part.blocks.size for part in parts if part.blocks.size]
    if any(size % first.blocks.block for size in sizes[:-1]):
        raise ValueError(f"column shards of {sizes} k are not cut at blocks of {first.blocks.block}")
    return replace(first, blocks=Blocks(sum(sizes), first.blocks.block), codes=codes, scales=scales)


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
