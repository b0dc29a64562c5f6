"""One stage of a model on one tensor rank: embedding, layers, output head, and the buffers they share."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu import attention as attention_kernel
from llama_hpc.kernels.cpu import elementwise
from llama_hpc.kernels.cpu.int8_weights import ByteWeights
from llama_hpc.kernels.cpu.matmul import LANES, IntegerWeights
from llama_hpc.kernels.numerics import BLOCK, down_block
from llama_hpc.model import rope
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.faults import Faults
from llama_hpc.model.kv_cache import KVCache
from llama_hpc.model.layer import LayerWeights, ParallelLayer
from llama_hpc.model.linear import Activation, ColumnParallelLinear, LinearWeights, RowParallelLinear
from llama_hpc.model.shares import StageShare, TensorShare


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds: ``embedding`` on the first stage, ``final_norm`` and ``head`` on the last (None elsewhere).

    ``quantized`` tells whether projections multiply integers. With tied embeddings both are the same object.
    """

    quantized: bool
    layers: list[LayerWeights]
    embedding: LinearWeights | None
    final_norm: np.ndarray | None
    head: LinearWeights | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, shared ones counted once."""
        linears = {id(w): w for w in (self.embedding, self.head) if w is not None}
        total = sum(w.weights.nbytes + w.bias.nbytes for w in linears.values())
        total += 0 if self.final_norm is None else self.final_norm.nbytes
        for layer in self.layers:
            a, m = layer.attention, layer.mlp
            total += sum(w.weights.nbytes + w.bias.nbytes for w in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down))
            total += sum(n.nbytes for n in (layer.attention_norm, layer.mlp_norm, a.q_norm, a.k_norm) if n is not None)
        return total


@dataclass
class Batch:
    """One step of one micro-batch: ``rows`` tokens, row by row the token, its sequence (slot) and its position, all int32.

    ``outputs`` are the rows whose logits are wanted.
    """

    rows: int
    tokens: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    outputs: np.ndarray


class Buffers:
    """Arrays that every layer of a stage writes in turn, allocated once for ``max_rows`` rows."""

    def __init__(self, config: ModelConfig, share: TensorShare, quantized: bool, cache: KVCache, reducer: TensorReducer,
                 max_rows: int, max_outputs: int, max_seq_len: int, threads: int):
        self.config, self.cache, self.reducer, self.threads, self.max_rows = config, cache, reducer, threads, max_rows
        self.faults = Faults()
        heads, kv_heads, ffn = len(share.query_heads), len(share.kv_heads), len(share.ffn)
        def floats(columns: int) -> np.ndarray:
            return np.zeros((max_rows, columns), np.float32)
        self.residual = floats(config.hidden_size)
        self.normed = Activation(floats(config.hidden_size), BLOCK, quantized)
        self.q, self.k, self.v = (floats(n * config.head_dim) for n in (heads, kv_heads, kv_heads))
        self.k_half, self.v_half = (np.zeros(x.shape, np.uint16) for x in (self.k, self.v))
        self.attended = Activation(floats(heads * config.head_dim), min(config.head_dim, BLOCK), quantized)
        self.gated = Activation(floats(ffn), down_block(config.intermediate_size), quantized)
        self.up = floats(ffn)
        widest = max(max_rows * max(config.hidden_size, heads * config.head_dim, ffn), max_outputs * len(share.vocabulary))
        self.sums = np.zeros(widest + max(max_rows, max_outputs) * LANES, np.int64)
        self.cosines, self.sines = rope.tables(config, max_seq_len)
        per_kv = config.num_heads // config.kv_heads
        self.kv_of_head = np.array([h // per_kv - share.kv_heads.start for h in share.query_heads], np.int32)
        self.attention_work = attention_kernel.workspace(threads, max_seq_len, config.head_dim)

    def norm(self, weight: np.ndarray, rows: int, name: str, layer: int = 0) -> None:
        """normed = RMS norm of the residual, ready for products."""
        status = elementwise.rms_norm(self.residual, weight, self.config.norm_eps, self.normed.values, rows)
        self.faults.note(status or self.normed.prepare(rows), name, layer)

    def column_parallel(self, name: str, layer: int, linear: LinearWeights) -> ColumnParallelLinear:
        return ColumnParallelLinear(name, layer, linear, self.max_rows, self.threads, self.faults, self.sums)

    def row_parallel(self, name: str, layer: int, linear: LinearWeights) -> RowParallelLinear:
        return RowParallelLinear(name, layer, linear, self.max_rows, self.threads, self.faults, self.sums, reducer=self.reducer)


class TransformerStage:
    """The part of a model that one rank computes. ``forward`` is collective over the tensor group."""

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights: StageWeights, reducer: TensorReducer,
                 *, sequences: int, max_seq_len: int, max_rows: int, max_outputs: int, threads: int):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        dtype = np.uint16 if weights.quantized else np.float32
        self.cache = KVCache(stage.layers, len(share.kv_heads), config.head_dim, sequences, max_seq_len, dtype)
        self.buffers = Buffers(config, share, weights.quantized, self.cache, reducer, max_rows, max_outputs, max_seq_len, threads)
        self.layers = [ParallelLayer(number, layer, self.buffers)
                       for number, layer in zip(stage.layers, weights.layers, strict=True)]
        self.logits = np.zeros((max_outputs if stage.last else 0, len(share.vocabulary)), np.float32)
        if stage.last:
            self._selected = Activation(np.zeros((max_outputs, config.hidden_size), np.float32), BLOCK, weights.quantized)
            self._head = ColumnParallelLinear("head", 0, weights.head, max_outputs, threads, self.faults, self.buffers.sums)

    @property
    def residual(self) -> np.ndarray:
        """float32 [max_rows, hidden_size]: what enters the stage (received before ``forward``) and what leaves it."""
        return self.buffers.residual

    @property
    def faults(self) -> Faults:
        return self.buffers.faults

    def forward(self, batch: Batch) -> None:
        """Runs the stage's layers on the residual; on the last stage also the logits [outputs, vocabulary of this rank]."""
        if self.stage.first:
            self._embed(batch)
        for layer in self.layers:
            layer.forward(batch)
        if self.stage.last and len(batch.outputs):
            self._project(batch.outputs)

    def _embed(self, batch: Batch) -> None:
        table, b, first = self.weights.embedding.weights, self.buffers, self.share.vocabulary.start
        if isinstance(table, IntegerWeights):
            elementwise.integer_embedding(table.values, table.factors, table.row_scales, self.config.hidden_size, batch.tokens,
                                          first, table.rows, b.residual, batch.rows)
        elif isinstance(table, ByteWeights):
            elementwise.byte_embedding(table.values, table.factors, table.row_scales, self.config.hidden_size, batch.tokens,
                                       first, table.rows, b.residual, batch.rows)
        else:
            elementwise.float_embedding(table.values, self.config.hidden_size, batch.tokens, first, table.rows, b.residual,
                                        batch.rows)
        self.reducer.sum_disjoint(b.residual[: batch.rows])

    def _project(self, outputs: np.ndarray) -> None:
        b, count = self.buffers, len(outputs)
        np.take(b.residual, outputs, axis=0, out=self._selected.values[:count])
        norm = elementwise.rms_norm(self._selected.values, self.weights.final_norm, self.config.norm_eps,
                                    self._selected.values, count)
        b.faults.note(norm or self._selected.prepare(count), "final_norm")
        self._head.forward(self._selected, self.logits, count)
