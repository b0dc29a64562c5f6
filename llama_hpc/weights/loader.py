"""From a checkpoint to one rank's kernel weights: reads only what the rank holds, quantises it, streams it in chunks.

Everything is canonical: a tensor's codes do not depend on how it is cut. What a shard cannot know alone (the maximum of
a row whose columns are dealt out) is combined as integers over the tensor group; codebooks come from sample rows that
the shape alone fixes. A checkpoint that offers ``packed`` (weights/store.py) is quantised already: its parts are taken as they
are.
"""

import hashlib

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.errors import CheckpointError
from llama_hpc.kernels import formats
from llama_hpc.kernels.codebook import fit_codebook, sample_rows
from llama_hpc.kernels.cpu.quantize import quantize_f16, quantize_q3_5, quantize_q4, quantize_q8, row_maxima
from llama_hpc.kernels.formats import LARGEST_WEIGHT, table_format
from llama_hpc.kernels.numerics import BLOCK, INFINITY_BITS, down_block
from llama_hpc.model.attention import AttentionWeights
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import cache_format
from llama_hpc.model.layer import LayerWeights
from llama_hpc.model.linear import NO_BIAS, LinearWeights
from llama_hpc.model.mlp import MLPWeights
from llama_hpc.model.shares import StageShare, TensorShare
from llama_hpc.model.transformer import StageWeights
from llama_hpc.weights.checkpoint import Checkpoint
from llama_hpc.weights.places import HostPlaces

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
CHUNK = 1 << 21                 # weights converted at a time


class PeerFailed(Exception):
    """Another rank of the tensor group could not load its share; it reports the reason."""


def load_stage(checkpoint: Checkpoint, weights_format: str, stage: StageShare, share: TensorShare, reducer: TensorReducer,
               stage_comm: MPI.Comm, *, threads: int = 1, progress=None, hashes: dict[str, str] | None = None,
               places=None) -> StageWeights:
    """One rank's weights. Collective over ``stage_comm``, the ranks of this stage in all replicas.

    ``progress()`` is called after each of ``loading_steps``. ``places``: where weights go (see ``weights.places``; default: the
    host's memory). With ``hashes``, the packed bytes of every whole tensor of the stage are hashed (SHA-256) into it on tensor
    rank 0; give it to all ranks of a tensor group or to none. Raises CheckpointError for damaged data, and PeerFailed on the
    ranks that wait for one that failed.
    """
    loader = _Loader(checkpoint, weights_format, share, reducer, threads, progress, hashes, places)
    if weights_format == "q3_5" and not loader.packed:
        loader.fit_codebooks(stage, stage_comm)
    try:
        weights = loader.stage(stage)
    except PeerFailed:
        raise
    except Exception:
        loader.synchronize(failed=True)
        raise
    loader.synchronize()
    return weights


def loading_steps(config: ModelConfig, weights_format: str, stage: StageShare, stage_comm: MPI.Comm, packed: bool = False) -> int:
    """How often ``load_stage`` reports progress: once a matrix, and once a codebook that this rank fits (none if ``packed``)."""
    fits = _quantised(stage)[stage_comm.rank :: stage_comm.size] if weights_format == "q3_5" and not packed else ()
    tables = 2 if stage.first and stage.last and not config.tie_embeddings else int(stage.first or stage.last)
    return len(_quantised(stage)) + tables + len(fits)


def tensor_coding(config: ModelConfig, name: str, weights_format: str) -> tuple[str, int]:
    """Format and reduction block of a tensor in a model of this weight format; a vector is float32 in blocks of 1."""
    if name in ("embedding", "head"):
        return table_format(weights_format, name), BLOCK
    part = name.rsplit(".", 1)[-1]
    return (weights_format, _blocks(config)[part]) if part in PROJECTIONS else ("f32", 1)


def quantize_tensor(checkpoint: Checkpoint, name: str, weights_format: str, *, threads: int = 1) -> formats.Packed | np.ndarray:
    """A whole tensor as a model of this weight format holds it; an array where that is plain numbers. Not collective.

    Raises CheckpointError for values that are not finite or too large for the format.
    """
    loader = _Loader(checkpoint, weights_format, None, None, threads, None, None)
    kind, block = tensor_coding(checkpoint.config, name, weights_format)
    shape = checkpoint.shape(name)
    if len(shape) == 1:
        return loader.vector(name)
    if kind == "q3_5":
        loader.codebooks[name] = loader.codebook(name)
    rows, blocks = range(shape[0]), formats.Blocks(shape[1], block)
    return _joined([part for _, part in loader.parts(name, rows, None, blocks, kind)], 0)


def _blocks(config: ModelConfig) -> dict[str, int]:
    """The reduction block of every projection."""
    row_parallel = {"o": min(config.head_dim, BLOCK), "down": down_block(config.intermediate_size)}
    return dict.fromkeys(PROJECTIONS, BLOCK) | row_parallel


def _quantised(stage: StageShare) -> list[str]:
    """The projections of a stage's layers, by name."""
    return [f"layers.{number}.{part}" for number in stage.layers for part in PROJECTIONS]


class _Loader:
    def __init__(self, checkpoint, weights_format, share, reducer, threads, progress, hashes, places=None):
        self.checkpoint, self.config, self.format = checkpoint, checkpoint.config, weights_format
        self.share, self.reducer, self.threads, self.places = share, reducer, threads, places or HostPlaces()
        self.progress, self.hashes = progress or (lambda: None), hashes
        self.packed = getattr(checkpoint, "packed", None)
        self.codebooks: dict[str, np.ndarray] = {}
        self.blocks = _blocks(self.config)

    def fit_codebooks(self, stage: StageShare, comm: MPI.Comm) -> None:
        """Fits the stage's codebooks, dealt out to the ranks of ``comm``. Collective over it; all ranks fail together."""
        names = _quantised(stage)
        failure, fitted = None, None
        try:
            fitted = [self.codebook(name) for name in names[comm.rank :: comm.size]]
        except Exception as error:
            failure = error
        everyone = comm.allgather(fitted)
        if failure is not None:
            raise failure
        if any(part is None for part in everyone):
            raise PeerFailed
        self.codebooks = {name: everyone[i % comm.size][i // comm.size] for i, name in enumerate(names)}

    def codebook(self, name: str) -> np.ndarray:
        """From sample rows of the whole tensor."""
        rows, columns = self.checkpoint.shape(name)
        chosen = sample_rows(rows, columns)
        sample = np.concatenate([self.checkpoint.read(name, slice(row, row + 1)) for row in chosen.tolist()])
        self._check(name, row_maxima(sample), chosen, "q3_5")
        self.progress()
        return fit_codebook(sample, formats.Blocks(columns, self.blocks[name.rsplit(".", 1)[-1]]), threads=self.threads)

    def stage(self, stage: StageShare) -> StageWeights:
        config = self.config
        def table(name: str) -> LinearWeights:
            return self.linear(name, self.share.vocabulary, None, BLOCK, table_format(self.format, name))
        embedding = table("embedding") if stage.first else None
        layers = [self.layer(number) for number in stage.layers]
        final_norm = head = None
        if stage.last:
            final_norm = self.vector("final_norm")
            name = "embedding" if config.tie_embeddings else "head"
            shared = embedding if config.tie_embeddings else None
            head = shared or table(name)
        quantized, kv_cache = self.format not in formats.PLAIN_BYTES, cache_format("auto", self.format)
        return StageWeights(quantized, kv_cache, layers, embedding, final_norm, head)

    def layer(self, number: int) -> LayerWeights:
        config, share, head_dim, prefix = self.config, self.share, self.config.head_dim, f"layers.{number}."
        q_rows = range(share.query_heads.start * head_dim, share.query_heads.stop * head_dim)
        kv_rows = range(share.kv_heads.start * head_dim, share.kv_heads.stop * head_dim)
        def linear(name: str, rows: range, columns: range | None, biased: bool) -> LinearWeights:
            bias = f"{prefix}{name}_bias" if biased else None
            return self.linear(prefix + name, rows, columns, self.blocks[name], self.format, bias)
        def column(name: str, rows: range, biased: bool) -> LinearWeights:
            return linear(name, rows, None, biased)
        def row(name: str, columns: range, biased: bool) -> LinearWeights:
            return linear(name, range(config.hidden_size), columns, biased)
        attention = AttentionWeights(
            column("q", q_rows, config.attention_bias), column("k", kv_rows, config.attention_bias),
            column("v", kv_rows, config.attention_bias), row("o", q_rows, config.output_bias),
            *((self.vector(prefix + "q_norm"), self.vector(prefix + "k_norm")) if config.qk_norm else ()))
        mlp = MLPWeights(*self.gate_up(prefix), row("down", share.ffn, config.mlp_bias))
        return LayerWeights(self.vector(prefix + "attention_norm"), attention, self.vector(prefix + "mlp_norm"), mlp)

    def vector(self, name: str, rows: range | None = None) -> np.ndarray:
        """A norm or a bias, float32, checked."""
        values = self.checkpoint.read(name, slice(rows.start, rows.stop) if rows is not None else None)
        self._check(name, row_maxima(values[:, None]), rows or range(len(values)))
        return values

    def gate_up(self, prefix: str) -> list[LinearWeights]:
        """The two matrices of one product, whose panels alternate in memory."""
        names, rows, width = (prefix + "gate", prefix + "up"), self.share.ffn, self.config.hidden_size
        codebooks = [self.codebook_of(name, BLOCK, self.format) for name in names]
        both = self.places.pair(self.format, len(rows), formats.Blocks(width, BLOCK), codebooks)
        return [self.filled(weights, name, rows, None, self.format, f"{name}_bias" if self.config.mlp_bias else None)
                for weights, name in zip(both, names, strict=True)]

    def linear(self, name: str, rows: range, columns: range | None, block: int, weights_format: str,
               bias: str | None = None) -> LinearWeights:
        """Rows and columns (None: all) of a projection in a weight format, and these rows of its bias."""
        blocks = formats.Blocks(self.checkpoint.shape(name)[1] if columns is None else len(columns), block)
        weights = self.places.one(weights_format, len(rows), blocks, self.codebook_of(name, block, weights_format))
        return self.filled(weights, name, rows, columns, weights_format, bias)

    def codebook_of(self, name: str, block: int, weights_format: str) -> np.ndarray | None:
        """The codebook that was fitted, or is stored with the matrix, whose coding is checked; None without one."""
        if not self.packed:
            return self.codebooks.get(name)
        self._check_coding(name, weights_format, block)
        return getattr(self.packed(name, slice(0)), "codebook", None)

    def filled(self, weights, name: str, rows: range, columns: range | None, weights_format: str,
               bias: str | None) -> LinearWeights:
        """A place that was made for these rows and columns, with their weights in it."""
        held: list = []
        for first, part in self.parts(name, rows, columns, weights.blocks, weights_format):
            self.places.fill(weights, first, part)
            if self.hashes is not None:
                held.append(part)
        if self.hashes is not None:
            self._hash(name, rows, columns, held)
        self.progress()
        return LinearWeights(self.places.complete(weights), self.vector(bias, rows) if bias else NO_BIAS)

    def parts(self, name: str, rows: range, columns: range | None, blocks: formats.Blocks, weights_format: str):
        """(first row within the share, weights as ``fill`` takes them) for chunks of the rows; their columns have ``blocks``."""
        if self.packed:
            part = None if columns is None else slice(columns.start, columns.stop)
            for chunk in self._row_chunks(name, rows):
                yield chunk.start - rows.start, self.packed(name, chunk, part)
            return
        codebook = self.codebooks.get(name)
        maxima = self._whole_row_maxima(name, rows, columns) if codebook is not None and columns is not None else None
        for first, values, own in self._chunks(name, rows, columns, weights_format):
            if codebook is not None:
                row_maximum = own if maxima is None else maxima[first : first + len(values)]
                yield first, quantize_q3_5(values, blocks, codebook, row_maximum, threads=self.threads)
            elif weights_format in ("q8", "q4"):
                quantize = quantize_q8 if weights_format == "q8" else quantize_q4
                yield first, quantize(values, blocks, threads=self.threads)
            else:
                yield first, quantize_f16(values, threads=self.threads) if weights_format == "f16" else values

    def _row_chunks(self, name: str, rows: range):
        """Slices of the rows, of CHUNK weights of whole rows."""
        step = max(1, CHUNK // max(1, self.checkpoint.shape(name)[1]))
        for first in range(rows.start, rows.stop, step):
            yield slice(first, min(first + step, rows.stop))

    def _chunks(self, name: str, rows: range, columns: range | None, weights_format: str):
        """(first row within the share, float32 [n, columns], integer maxima [n]) for chunks of the rows, checked."""
        part = None if columns is None else slice(columns.start, columns.stop)
        for chunk in self._row_chunks(name, rows):
            values = self.checkpoint.read(name, chunk, part)
            maxima = row_maxima(values)
            self._check(name, maxima, range(chunk.start, chunk.stop), weights_format)
            yield chunk.start - rows.start, values, maxima

    def _check_coding(self, name: str, weights_format: str, block: int) -> None:
        """Raises CheckpointError where a store holds a matrix in another form than this program computes with."""
        found = self.checkpoint.coding(name)
        if (found.format, found.block) != (weights_format, block):
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name} is {found.format} in blocks of {found.block}, expected "
                                  f"{weights_format} in blocks of {block}; make the file again with llama-hpc quantize")

    def _check(self, name: str, maxima: np.ndarray, rows, weights_format: str = "f32") -> None:
        """Raises CheckpointError for rows, of these numbers, that are not finite or too large for the format."""
        bad = np.flatnonzero(maxima >= INFINITY_BITS)
        if bad.size:
            raise CheckpointError(f"{self.checkpoint.path}: NaN or infinity in tensor {name}, row {rows[bad[0]]}; "
                                  "the file is damaged, or was converted wrongly")
        limit = LARGEST_WEIGHT.get(weights_format, np.inf)
        large = np.flatnonzero(maxima.view(np.float32) > limit)
        if large.size:
            found = maxima[large[0]].view(np.float32)
            raise CheckpointError(f"{self.checkpoint.path}: {found:.3g} in tensor {name}, row {rows[large[0]]}; the file is "
                                  f"damaged, or needs --weights f32: {self.format} holds up to {limit}")

    def _whole_row_maxima(self, name: str, rows: range, columns: range) -> np.ndarray:
        """uint32 maxima of whole rows, of which this rank holds some columns. Collective over the tensor group."""
        own = np.zeros(len(rows), np.uint32)
        for first, _, maxima in self._chunks(name, rows, columns, "q3_5"):
            own[first : first + len(maxima)] = maxima
        return self.synchronize(own)

    def synchronize(self, maxima: np.ndarray | None = None, failed: bool = False) -> np.ndarray:
        """Elementwise maximum over the tensor group, with a flag: raises PeerFailed when a rank says that it failed.

        Collective; every call moves the same hidden_size + 1 numbers, so a failed rank can join whichever comes next.
        """
        buffer = np.zeros(self.config.hidden_size + 1, np.uint32)
        if maxima is not None:
            buffer[:-1] = maxima
        buffer[-1] = failed
        self.reducer.maximum(buffer)
        if buffer[-1] and not failed:
            raise PeerFailed
        return buffer[:-1]

    def _hash(self, name, rows, columns, parts) -> None:
        """Hashes the whole tensor on tensor rank 0. Collective."""
        self.synchronize()
        shards = self.reducer.comm.gather((rows if columns is None else columns, parts))
        if shards is not None:
            self.hashes[name] = found = whole_hash(shards, self.checkpoint.shape(name), columns is not None)
            if self.packed and found != self.checkpoint.sha256(name):
                raise CheckpointError(f"{self.checkpoint.path}: damaged: tensor {name} has the SHA-256 {found[:16]}…, not "
                                      f"{self.checkpoint.sha256(name)[:16]}…; copy the file again, or make it again")


def whole_hash(shards, shape: tuple[int, int], cut_columns: bool) -> str:
    """SHA-256 of the packed bytes of a tensor from all shards; rows held twice (shared KV heads) count once."""
    done, pieces = 0, []
    for held, parts in shards:
        if not parts:
            continue
        skip, done = max(0, done - held.start), max(done, held.stop)
        pieces.append(_joined(parts, skip if not cut_columns else 0))
    if isinstance(pieces[0], np.ndarray):
        whole = np.concatenate(pieces, 1 if cut_columns else 0)
        kind, dtype = ("f16", "<u2") if whole.dtype == np.uint16 else ("f32", "<f4")
        data = np.ascontiguousarray(whole, dtype).tobytes()
        return hashlib.sha256(f"{kind} {shape[0]} {shape[1]}\n".encode() + data).hexdigest()
    return formats.concatenate(pieces, 1 if cut_columns else 0).sha256()


def _joined(parts: list, skip: int):
    """The row chunks of one shard as one array or Packed, without its first ``skip`` rows."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)[skip:]
    return formats.concatenate(parts, 0).rows(skip)
