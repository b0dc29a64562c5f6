"""Writing a result file: whole or not at all."""

import contextlib
import io
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results import provenance as provenance_group
from llama_hpc.results.digest import digest
from llama_hpc.results.schema import FORMAT, STATUSES, VERSION, Output, canonical_logprobs, canonical_tokens, storable

# Rows of a chunk: large enough to compress, small enough to read one answer of a big file.
_CHUNK = 65536


def check_output_path(path: str | Path, overwrite: bool) -> None:
    """Find out before any work whether ``write_results`` will be able to write ``path``.

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


def write_results(
    path: str | Path,
    requests: Sequence[Any],
    prompt_texts: Sequence[str | None],
    outputs: Sequence[Output],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    *,
    status: str = "complete",
    overwrite: bool = False,
) -> str:
    """Write one result file (schema.py) and return its digest. Not collective: one rank calls it with everything.

    ``requests`` (engine.requests.Request) are in input order, ``prompt_texts[r]`` is what the tokenizer got for request
    r (None where it was not asked), and ``outputs`` may come in any order; ``metrics`` are columns of tables.
    The file appears under ``path`` complete or not at all: it is written beside it under a temporary name, synced and
    renamed; on failure the temporary file is removed.

    Raises ResultsError for a file that cannot be written. Where ``path`` has come into being without ``overwrite``, the
    finished file stays under its temporary name, so that no work is lost, and the UsageError says so.
    """
    ordered = sorted(outputs, key=lambda output: (output.request, output.sample))
    _check(requests, prompt_texts, ordered, status)
    total = digest([request.id for request in requests], ordered)
    image = _image(requests, prompt_texts, ordered, provenance, metrics or {}, {"status": status, "digest": total})
    target = _target(path)
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        taken = os.path.exists(target) and not overwrite
        if not taken:
            os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise ResultsError(f"cannot write the results to {path}: {error.strerror}") from None
        raise
    if taken:
        raise UsageError(f"{path} exists, so the results of this run are in {temporary} (complete): rename that file")
    _sync_folder(target.parent)
    return total


def _target(path: str | Path) -> Path:
    """The file itself where ``path`` is a link: a rename would replace the link."""
    return Path(os.path.realpath(path))


def _temporary(target: Path) -> Path:
    """A name of this process alone, also among the hosts of a shared file system."""
    return target.with_name(f"{target.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check(requests: Sequence[Any], prompt_texts: Sequence[Any], ordered: Sequence[Output], status: str) -> None:
    if status not in STATUSES:
        raise ResultsError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
    if len(prompt_texts) != len(requests):
        raise ResultsError(f"{len(requests)} requests need as many prompt texts, got {len(prompt_texts)}")
    last = None
    for output in ordered:
        place = (output.request, output.sample)
        if not 0 <= output.request < len(requests):
            raise ResultsError(f"an output answers request {output.request}, but there are {len(requests)} requests")
        if place == last:
            raise ResultsError(f"request {output.request} has two outputs with the sample number {output.sample}")
        if len(output.tokens) != len(output.logprobs):
            sizes = f"{len(output.tokens)} tokens and {len(output.logprobs)} logprobs"
            raise ResultsError(f"an output of request {output.request} has {sizes}: they must be as many")
        shapes = output.top_tokens.shape, output.top_logprobs.shape
        if shapes[0] != shapes[1] or (output.top_tokens.size and shapes[0][0] != len(output.tokens)):
            raise ResultsError(f"an output of request {output.request} has {len(output.tokens)} tokens, but top tokens and "
                               f"log-probabilities of shapes {shapes[0]} and {shapes[1]}: a row for each token is needed")
        last = place


def _image(
    requests: Sequence[Any],
    prompt_texts: Sequence[str | None],
    ordered: Sequence[Output],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, np.ndarray]],
    attributes: Mapping[str, str],
) -> memoryview:
    """The bytes of the file. HDF5 works in memory because it crashes when a disk is full; plain writes only fail."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, **attributes})
        _write_requests(file.create_group("requests"), requests, prompt_texts)
        _write_outputs(file.create_group("outputs"), ordered)
        _write_timing(file.create_group("timing", track_order=True), ordered)
        for name, columns in metrics.items():
            group = file.create_group(f"metrics/{name}")
            for column, values in columns.items():
                _numbers(group, column, values)
        provenance_group.store(file.create_group("provenance"), provenance)
    return buffer.getbuffer()


def _write_requests(group: Any, requests: Sequence[Any], prompt_texts: Sequence[str | None]) -> None:
    _strings(group, "id", [request.id for request in requests])
    _strings(group, "prompt", [text or "" for text in prompt_texts])
    _strings(group, "sampling", [json.dumps(asdict(request.params)) for request in requests])
    if any(request.messages is not None for request in requests):
        _strings(group, "messages", [json.dumps(r.messages) if r.messages is not None else "" for r in requests])
    if any(request.token_ids is not None for request in requests):
        _ragged(group, "tokens", [canonical_tokens(request.token_ids or []) for request in requests], "<i4")


def _write_outputs(group: Any, ordered: Sequence[Output]) -> None:
    _numbers(group, "request", np.array([output.request for output in ordered], dtype="<i8"))
    _numbers(group, "sample", np.array([output.sample for output in ordered], dtype="<i4"))
    _numbers(group, "setbacks", np.array([output.setbacks for output in ordered], dtype="<i4"))
    _strings(group, "text", [output.text for output in ordered])
    _strings(group, "finish_reason", [output.finish_reason for output in ordered])
    _ragged(group, "tokens", [canonical_tokens(output.tokens) for output in ordered], "<i4")
    _numbers(group, "logprobs", _flat([canonical_logprobs(output.logprobs) for output in ordered], "<f4"))
    if any(output.top_tokens.size for output in ordered):
        tops = [canonical_tokens(output.top_tokens).ravel() for output in ordered]
        _ragged(group, "top_tokens", tops, "<i4", "top_offsets")
        _numbers(group, "top_logprobs", _flat([canonical_logprobs(output.top_logprobs).ravel() for output in ordered], "<f4"))


def _write_timing(group: Any, ordered: Sequence[Output]) -> None:
    group.attrs["unit"] = "seconds"
    for name in dict.fromkeys(name for output in ordered for name in output.timing):
        _numbers(group, name, np.array([output.timing.get(name, np.nan) for output in ordered], dtype="<f8"))


def _flat(pieces: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *pieces])


def _ragged(group: Any, name: str, pieces: Sequence[np.ndarray], dtype: str, bounds: str = "offsets") -> None:
    """One flat dataset and, beside it, ``bounds`` with those of each piece."""
    offsets = np.zeros(len(pieces) + 1, dtype="<i8")
    offsets[1:] = np.cumsum([len(piece) for piece in pieces])
    _numbers(group, name, _flat(pieces, dtype))
    _numbers(group, bounds, offsets)


def _numbers(group: Any, name: str, values: np.ndarray) -> None:
    _dataset(group, name, values, values.dtype)


def _strings(group: Any, name: str, values: Sequence[str]) -> None:
    import h5py

    _dataset(group, name, np.array([storable(value) for value in values], dtype=object), h5py.string_dtype())


def _dataset(group: Any, name: str, values: np.ndarray, dtype: Any) -> None:
    chunk = min(max(len(values), 1), _CHUNK)
    group.create_dataset(
        name, data=values, dtype=dtype, maxshape=(None,), chunks=(chunk,), compression="gzip", shuffle=True
    )
