"""The tensors of a Hugging Face folder: model.safetensors, or the shards that its index names.

Only headers are read here, straight from the format (8 bytes of length, then JSON; see
https://huggingface.co/docs/safetensors): a row and column slice can then touch just its own pages, and bfloat16
needs no framework.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .fields import read_json
from .stored import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000     # the format's own limit


def read_folder(folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The weight files of a folder in a fixed order, and their tensors by name. Raises CheckpointError."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return [single], read_header(single)
    if index.exists():
        return _read_shards(folder, index)
    others = sorted(p.name for pattern in ("*.bin", "*.pth", "*.safetensors") for p in folder.glob(pattern))
    found = f"; found {', '.join(others[:3])}, which is not read" if others else ""
    raise CheckpointError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def _read_shards(folder: Path, index: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: no weight_map")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: the shard of {name} is {shard!r}, expected the name of a file beside it")
    files = [folder / shard for shard in sorted(set(shard_of.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:3])}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if shard_of.get(name, file.name) == file.name:
                tensors[name] = tensor
    lost = [name for name in shard_of if name not in tensors]
    if lost:
        raise CheckpointError(f"{folder / shard_of[lost[0]]}: {lost[0]} is not in it, though {index.name} says so")
    return files, tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError when header or data are damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: truncated or no safetensors file: header of {header_bytes} bytes, "
                                      f"file of {size}")
            header = json.loads(file.read(header_bytes).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + header_bytes, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        numbers_ok = False
    if not numbers_ok:
        raise CheckpointError(f"{path}: damaged header entry of tensor {name}")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name} has the type {dtype}, supported are {', '.join(_ITEM_BYTES)}")
    item = _ITEM_BYTES[dtype]
    if end - begin != prod(shape) * item:
        raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} and type {dtype} takes "
                              f"{prod(shape) * item} bytes, its offsets give {end - begin}")
    if data_start + end > file_size:
        raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {data_start + end}, the file at "
                              f"{file_size}")
    return StoredTensor(name, path, data_start + begin, shape, dtype, 1, item)
