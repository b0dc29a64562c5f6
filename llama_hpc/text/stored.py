"""The tokenizer inside a store: the files of its checkpoint as they were, read from memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..weights.gguf_reader import GgufFile
from ..weights.store import GGUF_TOKENIZER, read_tokenizer_files
from .folder import FILES, read_folder
from .gguf_vocabulary import KEYS, read_metadata


@dataclass(frozen=True)
class MemoryPath:
    """A folder of files held in memory, or one of them: as much of ``pathlib.Path`` as reading a tokenizer takes."""

    place: Path
    files: Mapping[str, bytes]
    name: str = ""

    def __truediv__(self, name: str) -> "MemoryPath":
        return MemoryPath(self.place, self.files, name)

    def __str__(self) -> str:
        return str(self.place / self.name)

    def is_file(self) -> bool:
        return self.name in self.files

    def read_bytes(self) -> bytes:
        return self.files[self.name]

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)


def read_stored(path: Path) -> dict[str, Any] | None:
    """Parts of a Tokenizer, as ``folder.read_folder`` gives them; None without a tokenizer. Raises CheckpointError."""
    return read_tokenizer(read_tokenizer_files(path), path)


def read_tokenizer(files: Mapping[str, bytes], place: Path) -> dict[str, Any] | None:
    """The same from the files themselves; messages say that they lie in ``place``."""
    if GGUF_TOKENIZER in files:
        return read_metadata(GgufFile(place / GGUF_TOKENIZER, files[GGUF_TOKENIZER]))
    return read_folder(MemoryPath(place, files))


def tokenizer_files(checkpoint_path: Path) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer, for ``read_tokenizer``: those of a folder, or the metadata of a GGUF file."""
    if checkpoint_path.is_dir():
        return {name: path.read_bytes() for name in FILES if (path := checkpoint_path / name).is_file()}
    return {GGUF_TOKENIZER: GgufFile(checkpoint_path).excerpt(KEYS)}
