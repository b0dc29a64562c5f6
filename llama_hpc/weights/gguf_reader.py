"""The header of GGUF files: metadata and where each tensor lies (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The header is parsed here and not by gguf.GGUFReader, which makes several NumPy objects of every vocabulary entry: with
49,152 tokens that takes 2 s and 150 MB in each process, with Llama 3's vocabulary several times as much. Arrays are
decoded when asked for. Dequantisation is the gguf package's own.
"""

import functools
import re
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .stored import MappedFiles, StoredTensor

# GGUF value type -> struct code; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufFile:
    """Metadata and tensors of one GGUF file. Raises CheckpointError when it is damaged, cut short or not GGUF.

    ``tensors`` maps names to StoredTensor (shape [rows, columns], the reverse of the order in the file).
    """

    def __init__(self, path: Path, data: bytes | None = None):
        """``data``: the file's bytes, where they are not to be read from ``path``."""
        self.path = path
        self._data = MappedFiles().map(path) if data is None else data
        self._values: dict[str, tuple[int, int]] = {}      # key -> (type, position)
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._parse()
        except struct.error as error:
            raise CheckpointError(f"{path}: truncated: the header goes beyond the file's {len(self._data)} bytes"
                                  ) from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: damaged header: a name is not UTF-8") from error

    def section(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys start with a prefix, which is cut off."""
        return {key.removeprefix(prefix): self.get(key) for key in self._values if key.startswith(prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: bool, int, float, str, a list of them, or the default."""
        if key not in self._values:
            return default
        kind, position = self._values[key]
        try:
            return self._decode(kind, position)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: metadata {key} is not UTF-8") from error

    def excerpt(self, prefix: str) -> bytes:
        """A GGUF file without tensors that holds the metadata whose keys start with a prefix."""
        chosen = {key: place for key, place in self._values.items() if key.startswith(prefix)}
        parts = [struct.pack("<4sIQQ", b"GGUF", _VERSIONS[-1], 0, len(chosen))]
        for key, (kind, position) in chosen.items():
            name, value = key.encode(), self._data[position : self._skip(kind, position)]
            parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", kind), value]
        return b"".join(parts)

    def _parse(self) -> None:
        magic, version, tensor_count, value_count = struct.unpack_from("<4sIQQ", self._data, 0)
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: it starts with {magic!r}")
        if version not in _VERSIONS:
            hint = " (big-endian files are not supported)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path}: GGUF version {version}, supported are 2 and 3{hint}")
        position = 24
        for _ in range(value_count):
            key, position = self._string(position)
            (kind,) = struct.unpack_from("<I", self._data, position)
            self._values[key] = (kind, position + 4)
            position = self._skip(kind, position + 4)
        infos = []
        for _ in range(tensor_count):
            info, position = self._tensor_info(position)
            infos.append(info)
        alignment = self.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment}, expected a power of two")
        start = -(-position // alignment) * alignment
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: tensor {name} occurs twice")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor_info(self, position: int) -> tuple[tuple, int]:
        name, position = self._string(position)
        (dimensions,) = struct.unpack_from("<I", self._data, position)
        if dimensions > 4:
            raise CheckpointError(f"{self.path}: damaged header: tensor {name[:80]!r} has {dimensions} dimensions")
        *sizes, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", self._data, position + 4)
        return (name, tuple(reversed(sizes)), kind, offset), position + 16 + 8 * dimensions

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        coding = _coding(kind)
        if coding is None:
            raise CheckpointError(f"{self.path}: tensor {name} has the type {_type_name(kind)}, which is not supported")
        dtype, block_elements, block_bytes, decode = coding
        if shape and shape[-1] % block_elements:
            raise CheckpointError(f"{self.path}: tensor {name} has rows of {shape[-1]} values, not a multiple of the "
                                  f"{block_elements} of a {dtype} block")
        end = offset + prod(shape) // block_elements * block_bytes
        if end > len(self._data):
            raise CheckpointError(f"{self.path}: truncated: tensor {name} ends at byte {end}, the file at "
                                  f"{len(self._data)}")
        return StoredTensor(name, self.path, offset, shape, dtype, block_elements, block_bytes, decode)

    def _string(self, position: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, position)
        end = position + 8 + length
        if end > len(self._data):
            raise struct.error
        return self._data[position + 8:end].decode("utf-8"), end

    def _skip(self, kind: int, position: int) -> int:
        """The position after a value."""
        if kind in _SCALARS:
            end = position + struct.calcsize("<" + _SCALARS[kind])
        elif kind == _STRING:
            end = position + 8 + struct.unpack_from("<Q", self._data, position)[0]
        elif kind == _ARRAY:
            item, count = struct.unpack_from("<IQ", self._data, position)
            end = position + 12
            if item in _SCALARS:
                end += count * struct.calcsize("<" + _SCALARS[item])
            elif item == _STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", self._data, end)[0]
            else:
                raise CheckpointError(f"{self.path}: damaged header: array of unknown type {item} at byte {position}")
        else:
            raise CheckpointError(f"{self.path}: damaged header: metadata of unknown type {kind} at byte {position}")
        if end > len(self._data):
            raise struct.error
        return end

    def _decode(self, kind: int, position: int) -> Any:
        if kind == _STRING:
            return self._string(position)[0]
        if kind != _ARRAY:
            return struct.unpack_from("<" + _SCALARS[kind], self._data, position)[0]
        item, count = struct.unpack_from("<IQ", self._data, position)
        position += 12
        if item in _SCALARS:
            return list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self._data, position))
        strings = []
        for _ in range(count):
            string, position = self._string(position)
            strings.append(string)
        return strings


def read_files(path: Path) -> list[GgufFile]:
    """The parts of a GGUF checkpoint in order, the first of which holds the metadata; one unless the name is split.

    Raises CheckpointError when a part is missing (names end in -00001-of-0000N.gguf) or holds a tensor again.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        file = GgufFile(path)
        if (count := file.get("split.count", 0)) > 1:
            raise CheckpointError(f"{path}: one of {count} parts, but not named like name-00001-of-{count:05}.gguf")
        return [file]
    base, count = match[1], int(match[3])
    paths = [path.with_name(f"{base}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}")
    return [GgufFile(p) for p in paths]


@functools.cache
def _coding(kind: int) -> tuple[str, int, int, Callable[[np.ndarray], np.ndarray] | None] | None:
    """Name, elements and bytes of a block, and decoder of a tensor type; None where gguf cannot decode it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        qtype = GGMLQuantizationType(kind)
        elements, size = GGML_QUANT_SIZES[qtype]
        if qtype.name in ("F32", "F16", "BF16"):
            return qtype.name, elements, size, None
        decode = functools.partial(dequantize, qtype=qtype)
        decode(np.zeros((1, size), np.uint8))
    except (ValueError, KeyError, NotImplementedError):
        return None
    return qtype.name, elements, size, decode


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"
