"""Reading a result file, piece by piece."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError
from llama_hpc.results import provenance as provenance_group
from llama_hpc.results.digest import digest
from llama_hpc.results.schema import FORMAT, STATUSES, VERSION, Output

# Outputs read together: few calls into HDF5, little memory.
_BATCH = 1024
_OUTPUT_COLUMNS = ("request", "sample", "text", "finish_reason")


@dataclass
class Results:
    """An open result file; use it in a ``with`` block or call ``close``. Columns are read when first asked for.

    Every property and method raises ResultsError where the file turns out to be damaged.
    """

    path: Path
    status: str
    digest: str
    file: Any

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays usable."""
        self.file.close()

    @cached_property
    def ids(self) -> list[str]:
        """The id of every request, in input order."""
        return self._strings("requests/id").tolist()

    @cached_property
    def prompts(self) -> list[str]:
        """The prompt text of every request, in input order."""
        return self._strings("requests/prompt").tolist()

    @cached_property
    def request(self) -> np.ndarray:
        """int64 [n]: the row of the request that each output answers, ascending."""
        return self._numbers("outputs/request")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [n+1]: where the tokens of each output start in the flat arrays."""
        return self._numbers("outputs/offsets")

    @cached_property
    def top_offsets(self) -> np.ndarray:
        """int64 [n+1]: where the likeliest tokens of each output start in the flat arrays; zeros where there are none."""
        return self._numbers("outputs/top_offsets") if "outputs/top_offsets" in self.file else np.zeros_like(self.offsets)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the results came about, as given to ``write_results``."""
        with damage(self.path):
            return provenance_group.load(self.file["provenance"])

    @property
    def num_outputs(self) -> int:
        """Number of outputs: answers, over all requests and samples."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens over all outputs."""
        return int(self.offsets[-1])

    def outputs(self, start: int = 0, stop: int | None = None) -> Iterator[Output]:
        """The outputs ``start`` to ``stop`` - 1 (all by default), in (request, sample) order."""
        stop = self.num_outputs if stop is None else min(stop, self.num_outputs)
        for first in range(start, stop, _BATCH):
            yield from self._batch(first, min(first + _BATCH, stop))

    def outputs_of(self, row: int) -> list[Output]:
        """The outputs that answer the request in ``row``, by sample."""
        start, stop = np.searchsorted(self.request, [row, row + 1]).tolist()
        return list(self.outputs(start, stop))

    def verify(self) -> str:
        """Compute the digest again and return it. Raises ResultsError where the file says another."""
        found = digest(self.ids, self.outputs())
        if found != self.digest:
            raise ResultsError(f"{self.path}: the digest is {found}, but the file says {self.digest}: it was altered")
        return found

    def _batch(self, start: int, stop: int) -> list[Output]:
        rows = slice(start, stop)
        first, last = self.offsets[start], self.offsets[stop]
        tokens = self._numbers("outputs/tokens", slice(first, last))
        logprobs = self._numbers("outputs/logprobs", slice(first, last))
        samples = self._numbers("outputs/sample", rows).tolist()
        texts = self._strings("outputs/text", rows)
        reasons = self._strings("outputs/finish_reason", rows)
        setbacks = self._numbers("outputs/setbacks", rows).tolist() if "outputs/setbacks" in self.file else [0] * (stop - start)
        attempts = self._numbers("outputs/attempt", rows).tolist() if "outputs/attempt" in self.file else [0] * (stop - start)
        top_first, top_last = self.top_offsets[start], self.top_offsets[stop]
        top_tokens, top_logprobs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if top_last > top_first:
            top_tokens = self._numbers("outputs/top_tokens", slice(top_first, top_last))
            top_logprobs = self._numbers("outputs/top_logprobs", slice(top_first, top_last))
        with damage(self.path):
            timing = {name: column[rows].tolist() for name, column in self.file["timing"].items()}
        batch = []
        for i in range(stop - start):
            piece = slice(self.offsets[start + i] - first, self.offsets[start + i + 1] - first)
            times = {name: values[i] for name, values in timing.items() if values[i] == values[i]}
            request, count = int(self.request[start + i]), piece.stop - piece.start
            top = slice(self.top_offsets[start + i] - top_first, self.top_offsets[start + i + 1] - top_first)
            shape = count, (top.stop - top.start) // max(1, count)
            batch.append(Output(request, samples[i], tokens[piece], logprobs[piece], texts[i], reasons[i], times,
                                setbacks[i], top_tokens[top].reshape(shape), top_logprobs[top].reshape(shape), attempts[i]))
        return batch

    def _numbers(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        with damage(self.path):
            return self.file[name][rows]

    def _strings(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        with damage(self.path):
            return self.file[name].asstr()[rows]


def read_results(path: str | Path) -> Results:
    """Open a result file.

    Raises ResultsError for a file that is missing, not HDF5, truncated, not ours, or of a newer version.
    """
    with opened(path, {FORMAT: VERSION}) as (file, attributes):
        return results_in(Path(path), file, attributes)


def results_in(path: Path, file: Any, attributes: Mapping[str, Any]) -> Results:
    """What an open result file holds, once its sizes are found to be right. Raises ResultsError."""
    results = Results(path, attributes["status"], attributes["digest"], file)
    _check_shapes(results)
    return results


@contextmanager
def opened(path: str | Path, formats: Mapping[str, int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An h5py file of one of ``formats``, with their newest versions, and its root attributes; stays open unless the block fails.

    Raises ResultsError as ``read_results`` does.
    """
    import h5py

    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ResultsError(f"cannot read the result file {path}: {error.strerror}") from None
    if not h5py.is_hdf5(path):
        raise ResultsError(f"{path}: not an HDF5 file, so not a result file")
    with damage(path):
        file = h5py.File(path, "r")
    try:
        yield file, _checked(path, file, formats)
    except BaseException:
        file.close()
        raise


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turns what h5py raises for missing or unreadable pieces into one ResultsError."""
    try:
        yield
    except (OSError, AttributeError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].strip("\"'") if str(error) else type(error).__name__
        raise ResultsError(f"{path}: the result file is truncated or damaged: {reason}") from None


def _checked(path: Path, file: Any, formats: Mapping[str, int]) -> dict[str, Any]:
    """Root attributes of a file that is ours and not newer than this program."""
    with damage(path):
        attributes = dict(file.attrs)
    if attributes.get("format") not in formats:
        named = " or ".join(map(repr, formats))
        raise ResultsError(f"{path}: an HDF5 file, but no result file of llama_hpc (no attribute format = {named})")
    version, known = attributes.get("version"), formats[attributes["format"]]
    if not isinstance(version, np.integer) or version > known:
        raise ResultsError(f"{path}: version {version} of the format; this program reads up to {known}: update it")
    if attributes.get("status") not in STATUSES or not isinstance(attributes.get("digest"), str):
        raise ResultsError(f"{path}: the result file is damaged: no valid status and digest")
    return attributes


def _check_shapes(results: Results) -> None:
    with damage(results.path):
        prompts, texts = len(results.file["requests/id"]), len(results.file["requests/prompt"])
        length = {name: len(column) for name, column in results.file["outputs"].items()}
        total = length.pop("tokens")
        # Lengths first: a damaged one may be astronomical, and the column must not be read then.
        consistent = prompts == texts and total == length.pop("logprobs")
        bounds = length.pop("offsets")
        consistent = consistent and {bounds - 1} == {length[name] for name in _OUTPUT_COLUMNS}
        top = [length.get(name) for name in ("top_tokens", "top_logprobs", "top_offsets")]
        consistent = consistent and (top == [None] * 3 or (top[0] == top[1] and top[2] == bounds))
    if consistent:
        offsets, request = results.offsets, results.request
        consistent = offsets[0] == 0 and offsets[-1] == total and np.all(offsets[1:] >= offsets[:-1])
        consistent = consistent and np.all((request >= 0) & (request < prompts)) and np.all(request[1:] >= request[:-1])
    if consistent and top[0] is not None:
        tops, tokens = np.diff(results.top_offsets), np.diff(offsets)
        consistent = results.top_offsets[0] == 0 and results.top_offsets[-1] == top[0] and np.all(tops >= 0)
        consistent = consistent and not np.any(tops % np.maximum(tokens, 1)) and not np.any(tops[tokens == 0])
    if not consistent:
        raise ResultsError(f"{results.path}: the result file is damaged: sizes of its datasets contradict each other")
