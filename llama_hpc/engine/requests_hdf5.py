"""Prompts or texts from an HDF5 file: a user's own, or a result file of an earlier job."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llama_hpc.errors import UsageError


def read_columns(path: Path, group: str = "requests", sources: tuple[str, ...] = ("messages", "token_ids", "prompt")
                 ) -> list[dict[str, Any]]:
    """One dictionary a row with ``id`` (where there is one) and one of ``sources``, from the file's root or its ``group``.

    A row is taken from ``messages`` (JSON text) where it is not empty, else from its slice of ``tokens`` where that is
    not empty, else from the last of ``sources``. Raises UsageError.
    """
    try:
        with open(path, "rb"):
            pass
        if not h5py.is_hdf5(path):
            raise UsageError(f"{path}: not an HDF5 file")
        with h5py.File(path, "r") as file:
            return _rows(path, file, group, sources)
    # What h5py raises for a damaged file depends on where the damage is.
    except (OSError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is truncated or damaged"
        raise UsageError(f"cannot read {path}: {reason}") from None


def _rows(path: Path, file: h5py.File, group_name: str, sources: tuple[str, ...]) -> list[dict[str, Any]]:
    group = file[group_name] if isinstance(file.get(group_name), h5py.Group) else file
    columns: dict[str, list] = {}
    for name in ("id", *sources):
        if name != "token_ids" and name in group:
            columns[name] = _strings(path, group[name])
    if "tokens" in group and "offsets" in group:
        columns["token_ids"] = _token_lists(path, group)
    if not columns.keys() & set(sources):
        found = ", ".join(sorted(group)) or "nothing"
        raise UsageError(f"{path}: needs a dataset {sources[-1]}, or tokens and offsets, in {group.name}; found {found}")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UsageError(f"{path}: the datasets must have the same number of rows, got {sizes}")
    return [_row(path, columns, sources, row) for row in range(lengths.pop())]


def _row(path: Path, columns: dict[str, list], sources: tuple[str, ...], row: int) -> dict[str, Any]:
    entry = {"id": columns["id"][row]} if "id" in columns else {}
    source = next((name for name in sources if name in columns and columns[name][row]), None)
    if source == "messages":
        try:
            entry["messages"] = json.loads(columns["messages"][row])
        except ValueError as error:
            raise UsageError(f"{path}, row {row}: messages is not JSON: {error}") from None
    elif source:
        entry[source] = columns[source][row]
    else:
        entry[sources[-1]] = ""
    return entry


def _strings(path: Path, dataset: h5py.Dataset) -> list[str]:
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or h5py.check_string_dtype(dataset.dtype) is None:
        raise UsageError(f"{path}: {dataset.name} must be a one-dimensional dataset of strings")
    strings = []
    for row, value in enumerate(dataset[:]):
        try:
            strings.append(value.decode("utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{path}, row {row}: {dataset.name} is not UTF-8: write it as UTF-8 strings") from None
    return strings


def _token_lists(path: Path, group: h5py.Group) -> list[list[int]]:
    arrays = []
    for name in ("tokens", "offsets"):
        dataset = group[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or dataset.dtype.kind not in "iu":
            raise UsageError(f"{path}: {dataset.name} must be a one-dimensional dataset of integers")
        arrays.append(dataset[:])
    tokens, offsets = arrays
    if not offsets.size or offsets[0] != 0 or offsets[-1] != tokens.size or np.any(offsets[1:] < offsets[:-1]):
        raise UsageError(f"{path}: offsets must rise from 0 to the number of tokens, {tokens.size}")
    bounds = offsets.tolist()
    return [tokens[start:stop].tolist() for start, stop in pairwise(bounds)]
