"""Writing a result file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError
from llama_hpc.results.digest import digest
from llama_hpc.results.schema import FORMAT, STATUSES, VERSION, Output, canonical_logprobs, canonical_tokens
from llama_hpc.results.storage import flat, new_file, numbers, ragged, strings


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
    rescue: Path | None = None,
) -> str:
    """Write one result file (schema.py) and return its digest. Not collective: one rank calls it with everything.

    ``requests`` (engine.requests.Request) are in input order, ``prompt_texts[r]`` is what the tokenizer got for request
    r (None where it was not asked), and ``outputs`` may come in any order; ``metrics`` are columns of tables.
    The file appears under ``path`` complete or not at all; raises as ``storage.new_file`` does.
    """
    ordered = sorted(outputs, key=lambda output: (output.request, output.sample))
    _check(requests, prompt_texts, ordered, status)
    total = digest([request.id for request in requests], ordered)
    with new_file(path, FORMAT, VERSION, {"status": status, "digest": total}, provenance, overwrite, rescue) as file:
        _write_requests(file.create_group("requests"), requests, prompt_texts)
        _write_outputs(file.create_group("outputs"), ordered)
        _write_timing(file.create_group("timing", track_order=True), ordered)
        for name, columns in (metrics or {}).items():
            table = file.create_group(f"metrics/{name}")
            for column, values in columns.items():
                numbers(table, column, values)
    return total


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


def _write_requests(group: Any, requests: Sequence[Any], prompt_texts: Sequence[str | None]) -> None:
    strings(group, "id", [request.id for request in requests])
    strings(group, "prompt", [text or "" for text in prompt_texts])
    strings(group, "sampling", [json.dumps(asdict(request.params)) for request in requests])
    if any(request.messages is not None for request in requests):
        strings(group, "messages", [json.dumps(r.messages) if r.messages is not None else "" for r in requests])
    if any(request.token_ids is not None for request in requests):
        ragged(group, "tokens", [canonical_tokens(request.token_ids or []) for request in requests], "<i4")


def _write_outputs(group: Any, ordered: Sequence[Output]) -> None:
    numbers(group, "request", np.array([output.request for output in ordered], dtype="<i8"))
    numbers(group, "sample", np.array([output.sample for output in ordered], dtype="<i4"))
    numbers(group, "setbacks", np.array([output.setbacks for output in ordered], dtype="<i4"))
    numbers(group, "attempt", np.array([output.attempt for output in ordered], dtype="<i4"))
    strings(group, "text", [output.text for output in ordered])
    strings(group, "finish_reason", [output.finish_reason for output in ordered])
    ragged(group, "tokens", [canonical_tokens(output.tokens) for output in ordered], "<i4")
    numbers(group, "logprobs", flat([canonical_logprobs(output.logprobs) for output in ordered], "<f4"))
    if any(output.top_tokens.size for output in ordered):
        tops = [canonical_tokens(output.top_tokens).ravel() for output in ordered]
        ragged(group, "top_tokens", tops, "<i4", "top_offsets")
        numbers(group, "top_logprobs", flat([canonical_logprobs(output.top_logprobs).ravel() for output in ordered], "<f4"))


def _write_timing(group: Any, ordered: Sequence[Output]) -> None:
    group.attrs["unit"] = "seconds"
    for name in dict.fromkeys(name for output in ordered for name in output.timing):
        numbers(group, name, np.array([output.timing.get(name, np.nan) for output in ordered], dtype="<f8"))
