"""Records of finished answers in a file that only grows: what is whole can be told from what a killed job left half written.

A record is its length and the CRC-32 of its payload, little-endian uint32, and the payload: a length, JSON, then arrays.
"""

import errno
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError
from llama_hpc.results.patience import PASSING, patiently
from llama_hpc.results.schema import Output

_HEAD, _LENGTH = struct.Struct("<II"), struct.Struct("<I")
_ARRAYS = (("tokens", "<i4"), ("logprobs", "<f4"), ("top_tokens", "<i4"), ("top_logprobs", "<f4"))


def framed(facts: dict[str, Any], arrays: bytes = b"") -> bytes:
    """One record."""
    text = json.dumps(facts).encode()
    payload = _LENGTH.pack(len(text)) + text + arrays
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def output_record(output: Output) -> bytes:
    """The record of an answer."""
    arrays = [np.asarray(getattr(output, name), dtype) for name, dtype in _ARRAYS]
    facts = {"request": output.request, "sample": output.sample, "text": output.text, "finish_reason": output.finish_reason,
             "timing": output.timing, "setbacks": output.setbacks, "shapes": [array.shape for array in arrays]}
    return framed(facts, b"".join(array.tobytes() for array in arrays))


def output_of(payload: tuple[dict[str, Any], bytes], attempt: int) -> Output:
    """The answer that a record holds."""
    facts, data = payload
    arrays, at = {}, 0
    for (name, dtype), shape in zip(_ARRAYS, facts.pop("shapes"), strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * 4
    return Output(**facts, **arrays, attempt=attempt)


@dataclass
class Records:
    """What a file holds: payloads (JSON and the bytes behind it); bytes that are whole, and of a torn record behind them."""

    payloads: list[tuple[dict[str, Any], bytes]]
    whole: int
    torn: int


def read_records(path: Path) -> Records:
    """All whole records. A writer that was killed leaves at most one that is not, at the end (or zeros, where the node died).

    Raises ResultsError for a file that cannot be read, or with damage that has something behind it.
    """
    try:
        data = patiently(path.read_bytes, f"cannot read {path}", PASSING - {errno.ENOENT})
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    payloads, at = [], 0
    for payload, end in _payloads(data):
        if payload is None:
            if end < len(data) and data[at:].strip(b"\0"):
                raise ResultsError(f"{path} is damaged at byte {at} of {len(data)}, behind {len(payloads)} whole records: "
                                   "restore it, or remove it to have what it held computed again")
            break
        payloads.append(payload)
        at = end
    return Records(payloads, at, len(data) - at)


def first_record(path: Path) -> dict[str, Any] | None:
    """The JSON of a file's first record, without reading the rest; None where it is not whole. Raises ResultsError."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD.size)
            data = head + file.read(_HEAD.unpack(head)[0]) if len(head) == _HEAD.size else head
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    payload, _ = next(_payloads(data), (None, 0))
    return payload and payload[0]


def _payloads(data: bytes) -> Iterator[tuple[tuple[dict[str, Any], bytes] | None, int]]:
    """(payload, or None for one that is not whole; where it ends) of record after record."""
    at = 0
    while at < len(data):
        start = at + _HEAD.size
        length, crc = _HEAD.unpack_from(data, at) if start <= len(data) else (0, 0)
        at = max(start, start + length)
        payload = data[start:at]
        if at > len(data) or length < _LENGTH.size or zlib.crc32(payload) != crc:
            yield None, at
            return
        size = _LENGTH.unpack_from(payload)[0] + _LENGTH.size
        yield (json.loads(payload[_LENGTH.size : size]), payload[size:]), at
