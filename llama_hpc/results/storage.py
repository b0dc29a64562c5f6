"""Writing an HDF5 file: whole or not at all."""

import contextlib
import glob
import io
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results import provenance as provenance_group
from llama_hpc.results.patience import patiently
from llama_hpc.results.schema import storable

# Rows of a chunk: large enough to compress, small enough to read one answer of a big file.
_CHUNK = 65536


def check_output_path(path: str | Path, overwrite: bool) -> None:
    """Find out before any work whether ``new_file`` will be able to write ``path``.

    Raises UsageError where ``path`` exists and may not be replaced, ResultsError where its folder is missing or refuses
    a file (tried, because permission bits say little for root and on network file systems).
    """
    target = _target(path)
    if os.path.isdir(target):
        raise UsageError(f"the output {path} is a folder: give the name of a file")
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise UsageError(f"the output {path} is not a regular file: give another name")
        if not overwrite:
            raise UsageError(f"the output {path} exists: give another name or --overwrite")
    if not os.path.isdir(target.parent):
        found = "is not a folder" if os.path.exists(target.parent) else "does not exist"
        raise ResultsError(f"the output folder {target.parent} {found}: create it or give another")
    temporary = _temporary(target)
    try:
        with open(temporary, "xb"):
            pass
        os.unlink(temporary)
    except OSError as error:
        raise ResultsError(f"cannot write to the output folder {target.parent}: {error.strerror}") from None


@contextlib.contextmanager
def new_file(path: str | Path, format: str, version: int, attributes: Mapping[str, Any], provenance: Mapping[str, Any],
             overwrite: bool, rescue: Path | None = None) -> Iterator[Any]:
    """An h5py file to fill, with these root attributes; the group ``provenance`` is added behind what the block adds.

    It appears under ``path`` complete or not at all, when the block ends: it is written beside it under a temporary name, synced
    and renamed; on failure the temporary file is removed. What may pass is tried again for a while; a file that cannot be written
    then goes to the folder ``rescue``, if there is one.

    Raises ResultsError for a file that cannot be written to ``path``. Where that has come into being without ``overwrite``, the
    finished file stays under its temporary name, so that no work is lost, and the UsageError says so.
    """
    import h5py

    # In memory: HDF5 crashes when a disk is full, plain writes only fail.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update({"format": format, "version": version, **attributes})
        yield file
        provenance_group.store(file.create_group("provenance"), provenance)
    _write(path, buffer.getbuffer(), overwrite, rescue)


def _write(path: str | Path, image: memoryview, overwrite: bool, rescue: Path | None) -> None:
    target = _target(path)
    temporary = _temporary(target)
    try:
        taken = patiently(lambda: _replace(target, temporary, image, overwrite), f"cannot write the results to {path}")
    except OSError as error:
        saved = "" if rescue is None else f"; {_save(rescue / target.name, image)}"
        raise ResultsError(f"cannot write the results to {path}: {error.strerror}{saved}") from None
    if taken:
        raise UsageError(f"{path} exists, so the results of this run are in {temporary} (complete): rename that file")
    _sync_folder(target.parent)


def _replace(target: Path, temporary: Path, image: memoryview, overwrite: bool) -> bool:
    """Writes a file and renames it, unless there is another one under that name; returns whether there is. Raises OSError."""
    try:
        with open(temporary, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        taken = os.path.exists(target) and not overwrite
        if not taken:
            os.replace(temporary, target)
        return taken
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _save(path: Path, image: memoryview) -> str:
    """Writes a file in the second place, over no other one; returns what came of it, in words."""
    place = path if not path.exists() else _temporary(path)
    try:
        with open(place, "xb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        return f"they are in {place}"
    except OSError as error:
        return f"{place.parent} failed too: {error.strerror}"


def check_rescue(rescue: str | Path | None) -> Path | None:
    """The second place as a path. Raises UsageError where it is no folder."""
    if rescue is not None and not os.path.isdir(rescue):
        raise UsageError(f"--rescue {rescue} is not a folder: create it or give another")
    return None if rescue is None else Path(rescue)


def _target(path: str | Path) -> Path:
    """The file itself where ``path`` is a link: a rename would replace the link."""
    return Path(os.path.realpath(path))


_UNFINISHED = ".tmp-"


def _temporary(target: Path) -> Path:
    """A name of this process alone, also among the hosts of a shared file system."""
    return target.with_name(f"{target.name}{_UNFINISHED}{socket.gethostname()}-{os.getpid()}")


def remove_unfinished(path: str | Path) -> None:
    """Removes what processes have left that died while they wrote ``path``; nobody may be writing it now."""
    target = _target(path)
    for left in target.parent.glob(glob.escape(f"{target.name}{_UNFINISHED}") + "*"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flat(pieces: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """All pieces in one array."""
    return np.concatenate([np.zeros(0, dtype), *pieces])


def ragged(group: Any, name: str, pieces: Sequence[np.ndarray], dtype: str, bounds: str = "offsets") -> None:
    """One flat dataset and, beside it, ``bounds`` with those of each piece."""
    offsets = np.zeros(len(pieces) + 1, dtype="<i8")
    offsets[1:] = np.cumsum([len(piece) for piece in pieces])
    numbers(group, name, flat(pieces, dtype))
    numbers(group, bounds, offsets)


def numbers(group: Any, name: str, values: np.ndarray) -> None:
    """A dataset of numbers."""
    _dataset(group, name, values, values.dtype)


def strings(group: Any, name: str, values: Sequence[str]) -> None:
    """A dataset of UTF-8 strings."""
    import h5py

    _dataset(group, name, np.array([storable(value) for value in values], dtype=object), h5py.string_dtype())


def _dataset(group: Any, name: str, values: np.ndarray, dtype: Any) -> None:
    chunk = min(max(len(values), 1), _CHUNK)
    group.create_dataset(
        name, data=values, dtype=dtype, maxshape=(None,), chunks=(chunk,), compression="gzip", shuffle=True
    )
