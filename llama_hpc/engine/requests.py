"""Requests and the prompts files they come from: JSONL, text and HDF5.

Every field is checked here, before a model is loaded; what needs the tokenizer and the context length is checked by
``check_token_ids``. All errors are UsageError, one line, with the file and the 1-based line (HDF5: the 0-based row).
"""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_hpc.engine.sampling_params import MAX_INT32, SAMPLING_NAMES, SamplingParams, is_integer, shown
from llama_hpc.errors import UsageError

SOURCES = ("prompt", "messages", "token_ids")

# Settings of other engines that change the answer, and what they are called here: to ignore them in silence would mislead.
FOREIGN_SETTINGS = {
    "best_of": None, "max_completion_tokens": "max_tokens", "max_length": "max_tokens", "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens", "num_return_sequences": "n", "repeat_penalty": "repetition_penalty", "temp": "temperature",
    "typical_p": None,
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One prompt. ``index`` is its 0-based place in the input.

    Exactly one is set of ``prompt``, taken as it is, ``messages`` (dictionaries with ``role`` and ``content``), which
    go through the model's chat template, and ``token_ids``, which go to the model directly. ``arrival_s``: when it arrives,
    in seconds after the start of the run; None: it is there from the start. Raises UsageError for a field of the wrong
    type or an empty prompt.
    """

    index: int
    id: str
    prompt: str | None
    messages: list[dict[str, Any]] | None
    token_ids: list[int] | None
    params: SamplingParams
    arrival_s: float | None = None

    def __post_init__(self) -> None:
        check_id(self.id)
        if self.arrival_s is not None and not (_is_number(self.arrival_s) and 0 <= self.arrival_s < float("inf")):
            raise UsageError(f"arrival_s must be a number of seconds, 0 or more, got {shown(self.arrival_s)}")
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"give exactly one of {', '.join(SOURCES)}, got {' and '.join(given) or 'none'}")
        if self.prompt is not None:
            _check_prompt(self.prompt)
        elif self.messages is not None:
            _check_messages(self.messages)
        else:
            check_token_list(self.token_ids)


def read_requests(path: str | Path, default_params: SamplingParams) -> list[Request]:
    """The requests of a prompts file, in its order; the ending of the name says which kind it is.

    ``.jsonl`` and ``.json``: one JSON object a line with exactly one of ``prompt``, ``messages``, ``token_ids``, and
    optionally ``id``, ``arrival_s`` (of all prompts, ascending) and sampling settings (at the top level or in an object
    ``sampling``) that replace those of ``default_params``. Blank lines are skipped; other keys are ignored unless they look
    like a misspelt setting.

    ``.txt``: one prompt a line.

    ``.h5`` and ``.hdf5``: datasets ``prompt``, or ``tokens`` and ``offsets`` (prompt i is
    ``tokens[offsets[i]:offsets[i+1]]``), and optionally ``id``, at the root or in the group ``requests``; so a result
    file can be run again, with the sampling settings of ``default_params``.

    A prompt without an id gets its 0-based line number (HDF5: its row) as a string. Raises UsageError.
    """
    readers = {".jsonl": jsonl_entries, ".json": jsonl_entries, ".txt": _text_entries}
    readers.update({".h5": _hdf5_entries, ".hdf5": _hdf5_entries})
    requests = read_entries(path, "prompts", readers, lambda *entry: _request(*entry, default_params))
    for before, request in pairwise(requests):
        _check_arrival(path, before, request)
    return requests


def read_entries(path: str | Path, what: str, readers: dict[str, Callable[[Path], Iterator["Entry"]]],
                 make: Callable[[int, int, dict[str, Any]], Any]) -> list[Any]:
    """``make(index, number, fields)`` of every entry of a file of ``what``, things with an ``id`` that no two share.

    ``readers`` by the ending of the file's name. Raises UsageError with the place of the entry that is wrong.
    """
    path = Path(path)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: the name of a {what} file must end in {', '.join(readers)}")
    made: list[Any] = []
    places: dict[str, str] = {}
    for place, number, entry in reader(path):
        try:
            item = make(len(made), number, entry)
            if item.id in places:
                raise UsageError(f"id {shown(item.id)} is already used by {places[item.id]}")
        except UsageError as error:
            raise UsageError(f"{path}, {place}: {error}") from None
        places[item.id] = place
        made.append(item)
    if not made:
        raise UsageError(f"{path}: the file holds no {what}")
    return made


def _check_arrival(path: str | Path, before: Request, request: Request) -> None:
    """Raises UsageError for a request that arrives before the one above it, or without a time where that has one."""
    if (before.arrival_s is None) != (request.arrival_s is None):
        raise UsageError(f"{path}, id {shown(request.id)}: arrival_s is given for some prompts only: give it for all or for none")
    if request.arrival_s is not None and request.arrival_s < before.arrival_s:
        raise UsageError(f"{path}, id {shown(request.id)}: arrival_s {request.arrival_s:g} is before that of the prompt above, "
                         f"{before.arrival_s:g}: sort the prompts by their time")


def check_token_ids(request: Request, ids: Sequence[int], vocab_size: int, max_seq_len: int) -> None:
    """Check a tokenised prompt against the model: ids in the vocabulary, room for at least one token of the answer.

    Raises UsageError that names the request's id, the length and what to do.
    """
    name = f"request {shown(request.id)}"
    if not len(ids):
        raise UsageError(f"{name}: the prompt has no tokens: give at least one")
    if len(ids) >= max_seq_len:
        raise UsageError(
            f"{name}: the prompt has {len(ids)} tokens, but a context of {max_seq_len} holds at most {max_seq_len - 1} "
            "and one token of the answer: shorten the prompt or raise --max-seq-len as far as the model allows"
        )
    check_vocabulary(name, ids, vocab_size)


def check_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises UsageError for a token id that the model does not have."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"{name}: token id {token} at position {position} is outside the vocabulary (0 to {vocab_size - 1}): "
                "use the tokenizer of this model"
            )


def _request(index: int, number: int, entry: dict[str, Any], default_params: SamplingParams) -> Request:
    settings = {}
    for key, value in entry.items():
        if key in SAMPLING_NAMES:
            settings[key] = value
        elif key not in ("id", "sampling", "arrival_s", *SOURCES):
            _check_unknown(key)
    nested = {} if entry.get("sampling") is None else entry["sampling"]
    if not isinstance(nested, dict):
        raise UsageError(f"sampling must be an object of settings, got {shown(nested)}")
    twice = sorted(settings.keys() & nested.keys())
    if twice:
        raise UsageError(f"{', '.join(twice)} is given at the top level and in sampling: keep one")
    # Together, as settings are checked against each other.
    params = default_params.override(settings | nested)
    return Request(index, entry.get("id", str(number)), *(entry.get(name) for name in SOURCES), params,
                   entry.get("arrival_s"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_unknown(key: str) -> None:
    plain = key.lower().replace("-", "_")
    if plain in FOREIGN_SETTINGS:
        own = FOREIGN_SETTINGS[plain]
        advice = f"use {own}" if own else f"allowed are {', '.join(SAMPLING_NAMES)}"
        raise UsageError(f"key {shown(key)} is not a setting here: {advice}")
    near = difflib.get_close_matches(plain, SAMPLING_NAMES, n=1, cutoff=0.8)
    if near:
        raise UsageError(f"key {shown(key)} looks like the setting {near[0]!r}: correct or rename it")


def check_id(id: Any) -> None:
    """Raises UsageError for an id that a result file could not hold."""
    if not isinstance(id, str):
        raise UsageError(f"id must be a string, got {shown(id)}")
    check_unicode("id", id)
    if "\0" in id:
        raise UsageError(f"id must not hold a NUL character, got {shown(id)}")


def check_unicode(name: str, text: str) -> None:
    """Raises UsageError for a string that is no Unicode text."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{name} holds half of a surrogate pair, which is no Unicode text: {shown(ascii(text))}")


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise UsageError(f"prompt must be a string, got {shown(prompt)}")
    if not prompt:
        raise UsageError("the prompt is empty: give at least one character")
    check_unicode("prompt", prompt)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"messages must be a list of at least one message, got {shown(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UsageError(f"messages[{number}] must be an object with role and content, got {shown(message)}")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str):
                raise UsageError(f"messages[{number}] needs a string {key!r}, got {shown(text)}")
            check_unicode(f"messages[{number}]", text)
        if not message["role"]:
            raise UsageError(f"messages[{number}] has an empty role: use system, user or assistant")


def check_token_list(token_ids: Any) -> None:
    """Raises UsageError for what is no list of token ids."""
    if not isinstance(token_ids, list) or not token_ids:
        raise UsageError(f"token_ids must be a list of at least one token id, got {shown(token_ids)}")
    for position, token in enumerate(token_ids):
        if not is_integer(token) or not 0 <= token <= MAX_INT32:
            raise UsageError(f"token_ids[{position}] must be an integer from 0 to {MAX_INT32}, got {shown(token)}")


Entry = tuple[str, int, dict[str, Any]]     # place for messages, 0-based number, fields


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark. Raises UsageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UsageError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}): convert the file to UTF-8") from None


def _lines(path: Path) -> list[str]:
    # Not splitlines(): characters such as U+2028 are part of a prompt.
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def jsonl_entries(path: Path) -> Iterator[Entry]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in enumerate(_lines(path)):
        if not line.strip():
            continue
        place = f"line {number + 1}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UsageError(f"{path}, {place}: invalid JSON ({reason}): each line must be one JSON object") from None
        if not isinstance(entry, dict):
            raise UsageError(f"{path}, {place}: each line must be one JSON object, got {shown(entry)}")
        yield place, number, entry


def _text_entries(path: Path) -> Iterator[Entry]:
    lines = _lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines):
        place = f"line {number + 1}"
        if "\0" in line:
            raise UsageError(f"{path}, {place}: holds NUL bytes, so it is not UTF-8 text: convert the file to UTF-8")
        if not line.strip():
            raise UsageError(f"{path}, {place}: the prompt is empty: remove the line (a .jsonl file can hold any text)")
        yield place, number, {"prompt": line}


def _hdf5_entries(path: Path) -> Iterator[Entry]:
    from llama_hpc.engine.requests_hdf5 import read_columns

    for row, entry in enumerate(read_columns(path)):
        yield f"row {row}", row, entry
