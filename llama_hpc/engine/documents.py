"""Documents to be scored: the files they come from, their tokens, and the windows that cover them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.engine.requests import (
    Entry,
    check_id,
    check_token_list,
    check_unicode,
    check_vocabulary,
    jsonl_entries,
    read_entries,
    read_text,
)
from llama_hpc.engine.sampling_params import shown
from llama_hpc.errors import UsageError
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.rope import check_positions

USUAL_WINDOW = 2048


@dataclass(frozen=True)
class Document:
    """One document: exactly one is set of ``text`` and ``token_ids``. Raises UsageError for what cannot be one."""

    id: str
    text: str | None
    token_ids: list[int] | None

    def __post_init__(self) -> None:
        check_id(self.id)
        if (self.text is None) == (self.token_ids is None):
            raise UsageError(f"give exactly one of text, token_ids, got {'none' if self.text is None else 'both'}")
        if self.token_ids is not None:
            check_token_list(self.token_ids)
        elif not isinstance(self.text, str):
            raise UsageError(f"text must be a string, got {shown(self.text)}")
        elif not self.text:
            raise UsageError("the text is empty: give at least one character")
        else:
            check_unicode("text", self.text)


@dataclass(frozen=True)
class ReadyDocument:
    """A document as the engine needs it: ``tokens`` int32 [n], two at least."""

    id: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` - 1 of a document, which score those from ``first`` on.

    The last token is not run: nothing follows that it could tell the likelihood of.
    """

    document: int
    start: int
    stop: int
    first: int

    @property
    def rows(self) -> int:
        """Tokens to run."""
        return self.stop - self.start - 1

    @property
    def scored(self) -> int:
        """Tokens whose log-probability it yields."""
        return self.stop - self.first


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a file, in its order; the ending of the name says which kind it is.

    ``.jsonl`` and ``.json``: one JSON object a line with ``text`` or ``token_ids``, and optionally ``id``; other keys are
    ignored, blank lines skipped. ``.txt``: one document. ``.h5`` and ``.hdf5``: datasets ``text``, or ``tokens`` and ``offsets``
    (document i is ``tokens[offsets[i]:offsets[i+1]]``), and optionally ``id``, at the root or in the group ``documents``; so
    a file of scores can be scored again.

    A document without an id gets its 0-based line number (HDF5: its row) as a string. Raises UsageError.
    """
    readers = {".jsonl": jsonl_entries, ".json": jsonl_entries, ".txt": _text_entry, ".h5": _hdf5_entries, ".hdf5": _hdf5_entries}
    return read_entries(path, "texts", readers, _document)


def _document(index: int, number: int, entry: dict[str, Any]) -> Document:
    return Document(entry.get("id", str(number)), entry.get("text"), entry.get("token_ids"))


def _text_entry(path: Path) -> Iterator[Entry]:
    yield "the whole file", 0, {"text": read_text(path)}


def _hdf5_entries(path: Path) -> Iterator[Entry]:
    from llama_hpc.engine.requests_hdf5 import read_columns

    for row, entry in enumerate(read_columns(path, "documents", ("token_ids", "text"))):
        yield f"row {row}", row, entry


def tokenize(documents: list[Document], tokenizer, config: ModelConfig) -> list[ReadyDocument]:
    """Documents as tokens: texts with the special tokens that the model's tokenizer puts around a text (such as one for its
    beginning), token ids as they are.

    Raises UsageError for a text where the model has no tokenizer, ids outside the vocabulary, and fewer than two tokens.
    """
    ready = []
    for document in documents:
        name, ids = f"document {shown(document.id)}", document.token_ids
        if ids is None:
            if tokenizer is None:
                raise UsageError(f"{name}: the model has no tokenizer, so give token_ids")
            ids = tokenizer.encode(document.text)
        check_vocabulary(name, ids, config.vocab_size)
        if len(ids) < 2:
            raise UsageError(f"{name}: {len(ids)} token{'s' * (len(ids) != 1)}, but only a token that follows another one has a "
                             "likelihood: give at least two")
        ready.append(ReadyDocument(document.id, np.array(ids, np.int32)))
    return ready


def window_and_stride(window: int | None, stride: int | None, config: ModelConfig) -> tuple[int, int]:
    """Both, with their defaults: the smaller of the model's context and 2048, and half a window. Raises UsageError."""
    if window is None:
        window = min(config.context_length, USUAL_WINDOW)
    elif window > config.context_length:
        raise UsageError(f"--window {window} is longer than the model's context of {config.context_length}")
    check_positions(config, window)
    if stride is None:
        stride = window // 2
    elif stride > window:
        raise UsageError(f"--stride {stride} is longer than the window of {window}, so tokens between windows would have no "
                         f"likelihood: give at most {window}")
    return window, stride


def windows_of(documents: list[ReadyDocument], window: int, stride: int) -> list[Window]:
    """Windows of up to ``window`` tokens, one every ``stride``; each scores what the ones before it have not.

    The first token of a document has no likelihood, nor, with a stride as long as the window, the first one of any window.
    This is the recipe of Hugging Face's "Perplexity of fixed-length models".
    """
    windows = []
    for number, document in enumerate(documents):
        length, done = len(document.tokens), 0
        for start in range(0, length - 1, stride):
            stop = min(start + window, length)
            windows.append(Window(number, start, stop, max(done, start + 1)))
            done = stop
            if stop == length:
                break
    return windows
