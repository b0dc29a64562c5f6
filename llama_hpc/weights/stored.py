"""One tensor as it lies in a file, and reading a rectangle of it as float32 through a memory map."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..errors import CheckpointError

# Elements that a block format decodes at a time: gguf's dequantisation takes up to 20 bytes for each.
_DECODE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is coded.

    ``shape`` is [rows, columns] or [n]. A row is a sequence of blocks of ``block_elements`` values in ``block_bytes``
    bytes. ``decode`` turns uint8 [1, blocks * block_bytes] into float32 [1, blocks * block_elements]; None stands
    for the plain types F32, F16 and BF16.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    block_elements: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return prod(self.shape) // self.block_elements * self.block_bytes


class MappedFiles:
    """Read-only memory maps of files, made at first use and kept until this object goes."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def map(self, path: Path) -> mmap.mmap:
        """The map of a whole file. Raises CheckpointError when it cannot be opened."""
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return self._maps[path]

    def read(self, tensor: StoredTensor, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Rows and columns [first, end) of a tensor as a new float32 array, C-contiguous.

        A tensor of one dimension is a matrix of one row. Touches only the pages under the rectangle; beyond the result
        it needs a few MiB.
        """
        buffer = self.map(tensor.file)
        shape = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
        if tensor.decode is None:
            return _read_plain(buffer, tensor, shape, rows, columns)
        return _read_blocks(buffer, tensor, shape, rows, columns)


def _read_plain(buffer, tensor: StoredTensor, shape, rows, columns) -> np.ndarray:
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    # The file need not align its data: NumPy copies from a misaligned view correctly.
    stored = np.ndarray(shape, kind, buffer, tensor.offset)[slice(*rows), slice(*columns)]
    out = np.empty(stored.shape, np.float32)
    if tensor.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        bits = out.view(np.uint32)
        bits[...] = stored
        bits <<= np.uint32(16)
    else:
        out[...] = stored
    return out


def _read_blocks(buffer, tensor: StoredTensor, shape, rows, columns) -> np.ndarray:
    size = tensor.block_elements
    row_bytes = shape[1] // size * tensor.block_bytes
    stored = np.ndarray((shape[0], row_bytes), np.uint8, buffer, tensor.offset)
    # Only the blocks that hold a wanted column are decoded.
    first_block, end_block = columns[0] // size, -(-columns[1] // size)
    wanted = slice(columns[0] - first_block * size, columns[1] - first_block * size)
    out = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
    if out.size == 0:
        return out
    stored = stored[:, first_block * tensor.block_bytes:end_block * tensor.block_bytes]
    step = max(1, _DECODE_ELEMENTS // ((end_block - first_block) * size))
    for row in range(rows[0], rows[1], step):
        end = min(row + step, rows[1])
        codes = np.ascontiguousarray(stored[row:end])
        # Codes may hold infinities and NaN: whoever uses the values looks for them, a warning here would be noise.
        with np.errstate(all="ignore"):
            values = tensor.decode(codes.reshape(1, -1))
        out[row - rows[0]:end - rows[0]] = values.reshape(end - row, -1)[:, wanted]
    return out
