"""The store: a model in one HDF5 file as ``llama-hpc quantize`` writes it, its weights packed, each rank reading its own.

Version 1 holds (names of tensors as in ``layout``, all numbers little-endian, all datasets contiguous):

============================  ======================================================================================
root attributes               ``format``, ``version``, ``weights`` (weight format), ``source`` (name of the checkpoint),
                              ``source_content_hash``, ``bits_per_weight`` (layers, all matrices), ``llama_hpc``,
                              ``content_sha256``: of all that follows
``config``                    uint8: JSON of ModelConfig
``tokenizer/<file>``          uint8: the tokenizer's files; of a GGUF source its metadata as ``vocabulary.gguf``
``tensors/<name>``            attributes ``format``, ``shape``, ``block`` (k of a reduction block), ``sha256``
``tensors/<name>/<part>``     ``codes``, ``scales``, ``row_scales``, ``codebook`` as in ``formats.Packed``, 4-bit scales two to a
                              byte as in the canonical bytes; ``values`` for plain numbers
============================  ======================================================================================

``sha256`` is that of ``Packed.sha256`` for packed tensors. Nothing in a store depends on when, where or on how many ranks it was
made.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..kernels.formats import CODEBOOK_SIZE, FORMATS, Blocks, Packed
from ..kernels.numerics import GROUP
from ..model.config import ModelConfig, RopeConfig
from .layout import tensor_shapes
from .stored import MappedFiles

FORMAT, VERSION = "llama_hpc model", 1
PLAIN = {"f32": "<f4", "f16": "<f2"}
SUFFIXES = (".h5", ".hdf5")
GGUF_TOKENIZER = "vocabulary.gguf"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_store(path: Path) -> bool:
    """Whether a file is HDF5 by its first bytes, or says so by its name. Raises CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_SIGNATURE)) == _SIGNATURE or path.suffix.lower() in SUFFIXES
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class TensorCoding:
    """How a tensor is kept: a plain number format or a packed one, its shape, and its reduction block (vectors: 1)."""

    format: str
    shape: tuple[int, ...]
    block: int

    def parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every dataset of the tensor."""
        if self.format in PLAIN:
            return {"values": (self.shape, np.dtype(PLAIN[self.format]))}
        kind, n, groups = FORMATS[self.format], self.shape[0], Blocks(self.shape[1], self.block).groups
        nibbles = kind.factor_bits == 4
        found = {
            # A byte a weight is a number, less are bit fields.
            "codes": ((n, groups, kind.code_bytes), "i1" if kind.code_bytes == GROUP else "u1"),
            "scales": ((n, -(-groups // 2)), "u1") if nibbles else ((n, groups), f"<u{kind.factor_bits // 8}"),
        }
        if kind.row_bits:
            found["row_scales"] = (n,), f"<u{kind.row_bits // 8}"
        if kind.codebook_bytes:
            found["codebook"] = (CODEBOOK_SIZE, kind.codebook_bytes // CODEBOOK_SIZE), "i1"
        return {part: (shape, np.dtype(dtype)) for part, (shape, dtype) in found.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.parts().values())


def split(tensor: Packed | np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a whole tensor as they are stored, by the names of ``TensorCoding.parts``."""
    if isinstance(tensor, np.ndarray):
        # In memory f16 is a matter of bits.
        return {"values": tensor.view(np.float16) if tensor.dtype == np.uint16 else tensor}
    parts = {part: getattr(tensor, part) for part in ("codes", "scales", "row_scales", "codebook")}
    if FORMATS[tensor.format].factor_bits == 4:
        parts["scales"] = _pack_nibbles(tensor.scales)
    return {part: array for part, array in parts.items() if array is not None}


def content_hash(weights: str, config: bytes, tokenizer: Mapping[str, bytes], codings: Mapping[str, TensorCoding],
                 hashes: Mapping[str, str]) -> str:
    """SHA-256 over everything that a store computes with, tensors by their hashes."""
    files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(tokenizer.items())}
    tensors = [[name, c.format, list(c.shape), c.block, hashes[name]] for name, c in codings.items()]
    text = json.dumps([FORMAT, VERSION, weights, hashlib.sha256(config).hexdigest(), files, tensors])
    return hashlib.sha256(text.encode()).hexdigest()


def config_json(config: ModelConfig) -> bytes:
    """A configuration as it is stored; JSON keeps every float exactly."""
    return json.dumps(asdict(config), indent=1).encode()


class Store:
    """An opened store, with the interface of ``Checkpoint`` and ``packed`` for what need not be quantised any more.

    ``weights`` is its weight format, ``source`` the name and ``source_content_hash`` the fingerprint of the checkpoint that it
    was made from, ``content_sha256`` the hash of all that it holds.
    """

    def __init__(self, path: Path, config: ModelConfig, attributes: Mapping[str, str], codings: dict[str, TensorCoding],
                 hashes: dict[str, str], offsets: dict[str, dict[str, int]]):
        self.path, self.files, self.config = path, [path], config
        self.weights, self.source = attributes["weights"], attributes["source"]
        self.source_content_hash, self.content_sha256 = attributes["source_content_hash"], attributes["content_sha256"]
        self._codings, self._hashes, self._offsets = codings, hashes, offsets
        self._maps = MappedFiles()

    def names(self) -> list[str]:
        """The logical tensor names: embedding, layers in order, final_norm, head (absent when tied)."""
        return list(self._codings)

    def shape(self, name: str) -> tuple[int, ...]:
        """[rows, columns] or [n]."""
        return self._codings[name].shape

    def dtype(self, name: str) -> str:
        """The weight format of a matrix, F32 for vectors."""
        return self._codings[name].format.replace("f", "F")

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return self._codings[name].nbytes

    def coding(self, name: str) -> TensorCoding:
        """How the tensor is kept."""
        return self._codings[name]

    def sha256(self, name: str) -> str:
        """The hash that the file gives for a tensor."""
        return self._hashes[name]

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        """Rows and columns of a tensor: a new float32 array; packed ones are dequantised, whole rows at a time."""
        part = self.packed(name, rows)
        values = split(part)["values"] if isinstance(part, np.ndarray) else part.dequantize()
        return np.ascontiguousarray(values if columns is None else values[:, columns], np.float32)

    def packed(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Packed | np.ndarray:
        """Rows and columns (slices of step 1, columns cut at reduction blocks) of a tensor as they are stored, copied.

        Packed, or an array: float32, or uint16 bits of f16. Raises ValueError for columns that are cut elsewhere.
        """
        coding = self._codings[name]
        rows = rows or slice(None)
        if coding.format in PLAIN:
            values = self._part(name, "values")[rows if columns is None else (rows, columns)].copy()
            return values.view(np.uint16) if coding.format == "f16" else values
        first, end, _ = (columns or slice(None)).indices(coding.shape[1])
        if first % coding.block or (end % coding.block and end != coding.shape[1]):
            raise ValueError(f"columns {first} to {end} of {name} are not cut at blocks of {coding.block}")
        blocks = Blocks(max(0, end - first), coding.block)
        start = first // coding.block * blocks.groups_per_block
        groups = slice(start, start + blocks.groups)
        arrays = {part: self._part(name, part) for part in coding.parts()}
        codes = arrays["codes"][rows, groups].copy()
        if FORMATS[coding.format].factor_bits == 4:
            pairs = arrays["scales"][rows, groups.start // 2 : -(-groups.stop // 2)]
            scales = _unpack_nibbles(pairs)[:, groups.start % 2 :][:, : blocks.groups].copy()
        else:
            scales = arrays["scales"][rows, groups].copy()
        row_scales = arrays["row_scales"][rows].copy() if "row_scales" in arrays else None
        codebook = arrays["codebook"].copy() if "codebook" in arrays else None
        return Packed(coding.format, len(codes), blocks, codes, scales, row_scales, codebook)

    def _part(self, name: str, part: str) -> np.ndarray:
        """A part of a tensor as a view of the file."""
        shape, dtype = self._codings[name].parts()[part]
        return np.ndarray(shape, dtype, self._maps.map(self.path), self._offsets[name][part])


def open_store(path: Path) -> Store:
    """Open a store: reads everything but the weights, and checks it against the content hash.

    Raises CheckpointError for a file that is not HDF5, not a store, of a newer version, truncated, or altered.
    """
    with _opened(path) as file:
        attributes = {name: str(file.attrs[name]) for name in ("weights", "source", "source_content_hash", "content_sha256")}
        text, tokenizer = file["config"][:].tobytes(), _tokenizer_files(file)
        config = _config(text)
        codings, hashes, offsets = {}, {}, {}
        size = path.stat().st_size
        for name, shape in tensor_shapes(config).items():
            group = file["tensors"][name]
            codings[name] = coding = _coding(group, path, name, shape)
            hashes[name] = str(group.attrs["sha256"])
            offsets[name] = {part: _offset(path, name, part, group, *expected, size) for part, expected in coding.parts().items()}
        found = content_hash(attributes["weights"], text, tokenizer, codings, hashes)
        if found != attributes["content_sha256"]:
            raise CheckpointError(f"{path}: damaged: its contents have the SHA-256 {found[:16]}…, not "
                                  f"{attributes['content_sha256'][:16]}…; copy the file again, or make it again")
    return Store(path, config, attributes, codings, hashes, offsets)


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """The tokenizer's files of a store by name; none where its source had no tokenizer. Raises CheckpointError."""
    with _opened(path) as file:
        return _tokenizer_files(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The HDF5 file, ours and of a known version. What h5py raises for unreadable pieces becomes one CheckpointError."""
    import h5py

    try:
        # As a Python file: HDF5 locks files that it opens itself, which some parallel file systems refuse.
        with path.open("rb") as raw:
            if raw.read(len(_SIGNATURE)) != _SIGNATURE:
                raise CheckpointError(f"{path}: not an HDF5 file, so not a model of llama-hpc quantize")
            with h5py.File(raw, "r") as file:
                _check_kind(path, file)
                yield file
    except (OSError, AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].strip("\"'") if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or damaged: {reason}") from error


def _check_kind(path: Path, file: Any) -> None:
    if file.attrs.get("format") != FORMAT:
        raise CheckpointError(f"{path}: an HDF5 file, but not a model of llama-hpc quantize (no attribute format = {FORMAT!r})")
    version = file.attrs.get("version")
    if not isinstance(version, np.integer) or not 1 <= version <= VERSION:
        raise CheckpointError(f"{path}: version {version} of the format, this program reads up to {VERSION}: update it, or "
                              "make the file again with llama-hpc quantize")


def _tokenizer_files(file: Any) -> dict[str, bytes]:
    return {name: data[:].tobytes() for name, data in file["tokenizer"].items()}


def _config(text: bytes) -> ModelConfig:
    values = json.loads(text)
    rope = values.pop("rope")
    def tuples(table: dict) -> dict:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return ModelConfig(**tuples(values), rope=RopeConfig(**tuples(rope)))


def _coding(group: Any, path: Path, name: str, shape: tuple[int, ...]) -> TensorCoding:
    coding = TensorCoding(str(group.attrs["format"]), tuple(group.attrs["shape"].tolist()), int(group.attrs["block"]))
    known = coding.format in PLAIN or (coding.format in FORMATS and len(shape) == 2 and coding.block > 0)
    if not known or coding.shape != shape:
        raise CheckpointError(f"{path}: damaged: tensor {name} is {coding.format} {list(coding.shape)} in blocks of "
                              f"{coding.block}, expected {list(shape)} in {', '.join([*FORMATS, *PLAIN])}")
    return coding


def _offset(path: Path, name: str, part: str, group: Any, shape: tuple[int, ...], dtype: np.dtype, size: int) -> int:
    """Where a dataset's bytes lie in the file."""
    if part not in group:
        raise CheckpointError(f"{path}: damaged: tensor {name} has no {part}")
    data = group[part]
    if data.shape != shape or data.dtype != dtype:
        raise CheckpointError(f"{path}: damaged: {part} of tensor {name} is {data.dtype} {list(data.shape)}, expected {dtype} "
                              f"{list(shape)}")
    offset = data.id.get_offset()
    if prod(shape) == 0:
        return 0
    if offset is None or offset + prod(shape) * dtype.itemsize > size:
        raise CheckpointError(f"{path}: damaged: {part} of tensor {name} does not lie in the file in one piece")
    return offset


def _pack_nibbles(indices: np.ndarray) -> np.ndarray:
    """uint8 [n, groups] below 16 to [n, ceil(groups / 2)], the even group in the low four bits."""
    out = indices[:, ::2].copy()
    out[:, : indices.shape[1] // 2] |= indices[:, 1::2] << 4
    return out


def _unpack_nibbles(pairs: np.ndarray) -> np.ndarray:
    """uint8 [n, bytes] to [n, 2 x bytes]: the inverse of ``_pack_nibbles`` with what completes a last byte."""
    out = np.empty((len(pairs), 2 * pairs.shape[1]), np.uint8)
    out[:, ::2], out[:, 1::2] = pairs & 15, pairs >> 4
    return out
