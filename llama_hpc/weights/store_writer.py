"""Writing a store: ranks quantise whole tensors in parallel, the first one writes the file, whole or not at all.

The datasets lie where HDF5 puts them, but HDF5 itself only lays out the file, in memory: their bytes are written plainly, which
fails in order when a disk is full (HDF5 crashes), and the header last, so that an unfinished file is none.
"""

import contextlib
import hashlib
import os
import shutil
import socket
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from mpi4py import MPI

import llama_hpc
from llama_hpc.errors import CheckpointError, UsageError
from llama_hpc.kernels.formats import Packed
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.runtime.progress import Progress
from llama_hpc.text.stored import read_tokenizer, tokenizer_files
from llama_hpc.weights.checkpoint import Checkpoint
from llama_hpc.weights.fingerprint import fingerprint
from llama_hpc.weights.loader import quantize_tensor, tensor_coding, whole_hash
from llama_hpc.weights.store import FORMAT, VERSION, TensorCoding, config_json, content_hash, split

PIECE = 64 << 20                # bytes of a message and of a write
_PAGE = 4096


@dataclass(frozen=True)
class Written:
    """A finished store: bytes of the file, bits per weight all in (of the layers' projections, of all matrices), content hash."""

    size: int
    layer_bits: float
    bits: float
    sha256: str


def write_store(checkpoint: Checkpoint, weights: str, path: Path, comm: MPI.Comm, *, threads: int = 1, overwrite: bool = False
                ) -> Written:
    """Quantise a checkpoint into the store ``path``. Collective over ``comm``; all ranks fail together.

    The file's bytes depend on the checkpoint and the weight format alone. It appears under its name complete or not at all.
    Raises CheckpointError for damaged data and for a file that cannot be written, UsageError where ``path`` has come into being
    without ``overwrite``.
    """
    with agreed(comm, "opening the model"):
        codings = {name: TensorCoding(*_placed(checkpoint, name, weights)) for name in checkpoint.names()}
        tokenizer = tokenizer_files(checkpoint.path)
    attributes = {"weights": weights, "source": checkpoint.path.resolve().name,
                  "source_content_hash": fingerprint(checkpoint, comm)}
    writer = _Writer(path, checkpoint, codings, tokenizer, attributes) if comm.rank == 0 else None
    try:
        on_first(comm, _open, writer)
        hashes = _transfer(checkpoint, weights, codings, comm, threads, writer)
        return on_first(comm, _finish, writer, hashes, overwrite)
    finally:
        if writer is not None:
            writer.discard()


def _placed(checkpoint: Checkpoint, name: str, weights: str) -> tuple[str, tuple[int, ...], int]:
    kind, block = tensor_coding(checkpoint.config, name, weights)
    return kind, checkpoint.shape(name), block


def _open(writer: "_Writer") -> None:
    writer.open()


def _finish(writer: "_Writer", hashes: dict[str, str], overwrite: bool) -> Written:
    return writer.finish(hashes, overwrite)


def _transfer(checkpoint, weights: str, codings: dict[str, TensorCoding], comm: MPI.Comm, threads: int, writer) -> dict[str, str]:
    """Quantises every tensor on some rank and writes it on the first; returns all hashes there. Collective.

    Tensors of like size go together, one to each rank, so that none waits long for another.
    """
    order = sorted(codings, key=lambda name: -prod(codings[name].shape))
    hashes: dict[str, str] = {}
    with Progress(len(order), "tensors", "quantising", show=comm.rank == 0) as progress:
        for start in range(0, len(order), comm.size):
            names = order[start : start + comm.size]
            parts: dict[str, np.ndarray] = {}
            with agreed(comm, "quantising"):
                if comm.rank < len(names):
                    name = names[comm.rank]
                    tensor = quantize_tensor(checkpoint, name, weights, threads=threads)
                    hashes[name], parts = _hash(tensor), _checked(name, codings[name], tensor)
            failure = _gather(names, codings, parts, comm, writer, progress)
            with agreed(comm, "writing"):
                if failure is not None:
                    raise failure
    return {name: value for part in comm.gather(hashes) or () for name, value in part.items()}


def _gather(names: list[str], codings: dict[str, TensorCoding], parts: dict[str, np.ndarray], comm: MPI.Comm, writer, progress
            ) -> Exception | None:
    """The tensors of all ranks go to the first one, which writes them; it receives the rest even if it cannot write any more."""
    if comm.rank:
        for array in parts.values():
            for piece in _pieces(array.reshape(-1).view(np.uint8)):
                comm.Send([piece, MPI.BYTE], 0)
        return None
    failure, buffer = None, np.empty(PIECE, np.uint8) if comm.size > 1 else None
    for sender, name in enumerate(names):
        for part, (shape, dtype) in codings[name].parts().items():
            position = writer.offsets[name][part]
            whole = parts[part].reshape(-1).view(np.uint8) if sender == 0 else None
            for first in range(0, prod(shape) * dtype.itemsize, PIECE):
                size = min(PIECE, prod(shape) * dtype.itemsize - first)
                if sender:
                    comm.Recv([buffer[:size], MPI.BYTE], sender)
                piece = buffer[:size] if sender else whole[first : first + size]
                try:
                    if failure is None:
                        writer.write(position + first, piece)
                except OSError as error:
                    failure = CheckpointError(f"cannot write the model to {writer.path}: {error.strerror}")
        progress.update()
    return failure


def _pieces(data: np.ndarray):
    for first in range(0, len(data), PIECE):
        yield data[first : first + PIECE]


def _hash(tensor: Packed | np.ndarray) -> str:
    """The hash of a whole tensor; of a vector, that of its shape and bytes."""
    if isinstance(tensor, np.ndarray) and tensor.ndim == 1:
        return hashlib.sha256(f"f32 {len(tensor)}\n".encode() + tensor.astype("<f4").tobytes()).hexdigest()
    shape = tensor.shape if isinstance(tensor, np.ndarray) else (tensor.n, tensor.blocks.size)
    return whole_hash([(range(shape[0]), [tensor])], shape, False)


def _checked(name: str, coding: TensorCoding, tensor: Packed | np.ndarray) -> dict[str, np.ndarray]:
    """The parts as they are stored: little-endian, contiguous, of the shapes and types that the file has room for."""
    parts, expected = split(tensor), coding.parts()
    found = {part: (array.shape, array.dtype.newbyteorder("<")) for part, array in parts.items()}
    if found != expected:
        raise ValueError(f"tensor {name} in {coding.format} consists of {found}, expected {expected}")
    return {part: np.ascontiguousarray(parts[part], expected[part][1]) for part in expected}


class _Writer:
    """The file on the first rank. ``offsets``: where the bytes of each part of each tensor go."""

    def __init__(self, path: Path, checkpoint: Checkpoint, codings: dict[str, TensorCoding], tokenizer: dict[str, bytes],
                 attributes: dict[str, Any]):
        self.path, self.codings, self.tokenizer = path, codings, tokenizer
        # The file itself where the path is a link: a rename would replace the link.
        self.target = Path(os.path.realpath(path))
        self.temporary = self.target.with_name(f"{self.target.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        self.config = config_json(checkpoint.config)
        matrices = {name: coding for name, coding in codings.items() if len(coding.shape) == 2}
        layers = [coding for name, coding in matrices.items() if name.startswith("layers.")]
        self.bits = _bits(layers), _bits(matrices.values())
        self.attributes = {"format": FORMAT, "version": VERSION, "llama_hpc": llama_hpc.__version__,
                           "bits_per_weight": self.bits, **attributes}
        self.offsets: dict[str, dict[str, int]] = {}
        self.file: IO[bytes] | None = None
        self.size = 0

    def open(self) -> None:
        """Checks the tokenizer, lays out the file, and begins it under a temporary name."""
        read_tokenizer(self.tokenizer, self.path)
        with contextlib.closing(self._header(dict.fromkeys(self.codings, "0" * 64))) as image:
            self.size = os.fstat(image.fileno()).st_size
        folder = self.target.parent
        free = shutil.disk_usage(folder).free
        if free < self.size:
            raise CheckpointError(f"the folder {folder} has {free / 2**30:.2f} GiB free, but the model takes "
                                  f"{self.size / 2**30:.2f} GiB: give another, or make room")
        with self._naming_errors():
            self.file = self.temporary.open("xb")

    def write(self, position: int, data) -> None:
        """Bytes of a tensor at their place. Raises OSError."""
        self.file.seek(position)
        self.file.write(data)

    def finish(self, hashes: dict[str, str], overwrite: bool) -> Written:
        """Writes the header and gives the file its name."""
        with self._naming_errors():
            self._write_header(hashes)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if os.path.exists(self.target) and not overwrite:
                raise UsageError(f"{self.path} exists now: give another name or --overwrite")
            os.replace(self.temporary, self.target)
        with contextlib.suppress(OSError):
            # Some network file systems refuse to sync a folder; the file itself is safe by then.
            descriptor = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return Written(self.size, *self.bits, self._content(hashes))

    def _write_header(self, hashes: dict[str, str]) -> None:
        """Everything between the tensors, and the file's length."""
        ranges = sorted((offset, prod(shape) * dtype.itemsize) for name, coding in self.codings.items()
                        for offset, (shape, dtype) in zip(self.offsets[name].values(), coding.parts().values(), strict=True))
        with contextlib.closing(self._header(hashes)) as image:
            position = 0
            for first, length in [*ranges, (self.size, 0)]:
                self.write(position, os.pread(image.fileno(), first - position, position))
                position = first + length

    def discard(self) -> None:
        """Removes what has not been finished."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)

    @contextlib.contextmanager
    def _naming_errors(self):
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot write the model to {self.path}: {error.strerror}") from error

    def _content(self, hashes: dict[str, str]) -> str:
        return content_hash(self.attributes["weights"], self.config, self.tokenizer, self.codings, hashes)

    def _header(self, hashes: dict[str, str]) -> IO[bytes]:
        """A file in memory as sparse as HDF5 leaves it: all but the tensors' bytes, for which it has room at ``offsets``.

        Hashes of equal length give equal offsets.
        """
        import h5py

        image = os.fdopen(os.memfd_create("header"), "w+b")
        # Metadata in blocks of their own, large datasets at pages: quick to open and to read.
        with h5py.File(image, "w", alignment_threshold=_PAGE, alignment_interval=_PAGE, meta_block_size=1 << 16) as file:
            file.attrs.update({**self.attributes, "content_sha256": self._content(hashes)})
            file.create_dataset("config", data=np.frombuffer(self.config, np.uint8))
            group = file.create_group("tokenizer")
            for name, data in sorted(self.tokenizer.items()):
                group.create_dataset(name, data=np.frombuffer(data, np.uint8))
            tensors = file.create_group("tensors")
            for name, coding in self.codings.items():
                group = tensors.create_group(name)
                group.attrs.update({"format": coding.format, "shape": coding.shape, "block": coding.block,
                                    "sha256": hashes[name]})
                found = {part: _room(group, part, *kind) for part, kind in coding.parts().items()}
                if self.offsets.setdefault(name, found) != found:
                    raise ValueError(f"tensor {name} has moved from {self.offsets[name]} to {found}")
        image.flush()
        return image


def _room(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """A contiguous dataset whose bytes are written later; returns where they go in the file."""
    from h5py import h5d, h5p, h5s, h5t

    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    data = h5d.create(group.id, name.encode(), h5t.py_create(dtype, logical=True), h5s.create_simple(shape), properties)
    return data.get_offset() or 0


def _bits(codings) -> float:
    """Bits per weight all in."""
    codings = list(codings)
    return 8 * sum(coding.nbytes for coding in codings) / sum(prod(coding.shape) for coding in codings)
