"""Where the weights that a loader reads, and quantises, go: the host's memory as its kernels want it, or a device."""

from dataclasses import dataclass, field

import numpy as np

from llama_hpc.kernels import formats
from llama_hpc.kernels.formats import Blocks, Packed


class HostPlaces:
    """Memory of this process, which the threads of ``pool`` touch first."""

    def __init__(self, pool=None):
        self._pool = pool

    def one(self, weights_format: str, rows: int, blocks: Blocks, codebook: np.ndarray | None):
        """A place for one matrix."""
        from llama_hpc.kernels.cpu.weights import allocate
        return allocate(weights_format, rows, blocks, codebook, self._pool)

    def pair(self, weights_format: str, rows: int, blocks: Blocks, codebooks: list[np.ndarray | None]) -> list:
        """Places for the gate and up of one product."""
        from llama_hpc.kernels.cpu.weights import allocate_pair
        return allocate_pair(weights_format, rows, blocks, codebooks, self._pool)

    def fill(self, place, first_row: int, part: np.ndarray | Packed) -> None:
        """Stores rows from ``first_row`` on."""
        from llama_hpc.kernels.cpu.weights import fill
        fill(place, first_row, part)

    def complete(self, place):
        """What products take, when all rows are there."""
        return place


@dataclass
class _Gathered:
    """Rows of a matrix that come in pieces."""

    format: str
    rows: int
    blocks: Blocks
    codebook: np.ndarray | None
    parts: list = field(default_factory=list)


class DevicePlaces:
    """Memory of a GPU: the rows of a matrix are gathered on the host, laid out there once, and uploaded."""

    def __init__(self, device):
        self._device = device

    def one(self, weights_format: str, rows: int, blocks: Blocks, codebook: np.ndarray | None) -> _Gathered:
        """A place for one matrix."""
        return _Gathered(weights_format, rows, blocks, codebook)

    def pair(self, weights_format: str, rows: int, blocks: Blocks, codebooks: list[np.ndarray | None]) -> list[_Gathered]:
        """Places for the gate and up of one product."""
        return [self.one(weights_format, rows, blocks, codebook) for codebook in codebooks]

    def fill(self, place: _Gathered, first_row: int, part: np.ndarray | Packed) -> None:
        """Stores rows, which come in order."""
        place.parts.append(part)

    def complete(self, place: _Gathered):
        """What products take, when all rows are there; ``EmptyWeights`` where a rank holds none."""
        from llama_hpc.kernels.cuda.weights import lay_out
        if not place.rows or not place.blocks.size:
            return EmptyWeights(place.rows, place.blocks)
        whole = formats.concatenate(place.parts, 0) if isinstance(place.parts[0], Packed) else np.concatenate(place.parts)
        return lay_out(whole, place.blocks).upload(self._device)


@dataclass(frozen=True)
class EmptyWeights:
    """A share without rows or without columns."""

    rows: int
    blocks: Blocks
    nbytes: int = 0
