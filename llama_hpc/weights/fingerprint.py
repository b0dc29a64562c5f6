"""A hash of what a checkpoint consists of, in pieces that are dealt to ranks.

SHA-256 of every 64 MiB of every file, then SHA-256 over these digests in order. A piece's digest covers the file's name
and the piece's place, so that neither renaming nor exchanging pieces goes unnoticed.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..runtime.abort import agreed
from ..runtime.progress import Progress
from .checkpoint import Checkpoint

CHUNK_BYTES = 64 << 20
_MANY_CHUNKS = 32               # hashing so many takes seconds
_READ_BYTES = 1 << 20
_SETTINGS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
)


class Chunk(NamedTuple):
    """``length`` bytes of a file from ``offset``."""

    path: Path
    offset: int
    length: int


def content_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that decide what a checkpoint computes, sorted by name: weights, settings and tokenizer."""
    files = list(checkpoint.files)
    if checkpoint.path.is_dir():
        files += [path for name in _SETTINGS if (path := checkpoint.path / name).is_file()]
    return sorted(files, key=lambda path: path.name)


def chunk_list(files: Iterable[Path]) -> list[Chunk]:
    """Cut files into pieces of 64 MiB, in order; an empty file gives one empty piece. Raises CheckpointError."""
    chunks = []
    for path in files:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        starts = range(0, size, CHUNK_BYTES) or [0]
        chunks += [Chunk(path, start, min(CHUNK_BYTES, size - start)) for start in starts]
    return chunks


def hash_chunk(chunk: Chunk) -> bytes:
    """The SHA-256 (32 bytes) of a piece with its file's name and place. Raises CheckpointError."""
    name = chunk.path.name.encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(b"%d %s %d %d\n" % (len(name), name, chunk.offset, chunk.length))
    left = chunk.length
    try:
        with chunk.path.open("rb") as file:
            file.seek(chunk.offset)
            while left and (data := file.read(min(left, _READ_BYTES))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise CheckpointError(f"{chunk.path}: cannot be read: {error.strerror}") from error
    if left:
        raise CheckpointError(f"{chunk.path}: changed while it was read: {left} bytes fewer than at the start")
    return digest.digest()


def combine(digests: Iterable[bytes]) -> str:
    """The fingerprint (64 lower-case hexadecimal digits) of the digests of all pieces, in the order of chunk_list."""
    return hashlib.sha256(b"llama_hpc content 1\n" + b"".join(digests)).hexdigest()


def fingerprint(checkpoint: Checkpoint, comm) -> str:
    """The fingerprint of a checkpoint's files, pieces dealt to the ranks of ``comm``. Collective; all ranks fail together."""
    with agreed(comm, "hashing the model"):
        chunks = chunk_list(content_files(checkpoint))
        dealt = chunks[comm.rank :: comm.size]
        own = []
        with Progress(len(dealt), "pieces", "hashing the model", show=comm.rank == 0 and len(dealt) >= _MANY_CHUNKS) as progress:
            for chunk in dealt:
                own.append(hash_chunk(chunk))
                progress.update()
    digests = comm.allgather(own)
    return combine(digests[i % comm.size][i // comm.size] for i in range(len(chunks)))
