"""One stage of a model on one tensor rank: embedding, layers, output head, and the buffers they share."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu import attention as attention_kernel
from llama_hpc.kernels.cpu import elementwise, joining, sampling
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.memory import aligned
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
from llama_hpc.kernels.numerics import BLOCK, down_block
from llama_hpc.model import rope
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.faults import Faults
from llama_hpc.model.kv_cache import KVCache
from llama_hpc.model.layer import LayerWeights, ParallelLayer
from llama_hpc.model.linear import ColumnParallelLinear, LinearWeights
from llama_hpc.model.shares import VOCABULARY_TILE, StageShare, TensorShare
from llama_hpc.model.steps import Steps


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds: ``embedding`` on the first stage, ``final_norm`` and ``head`` on the last (None elsewhere).

    ``quantized`` tells whether projections multiply integers, ``half_cache`` whether keys and values are kept in float16. With
    tied embeddings both are the same object.
    """

    quantized: bool
    half_cache: bool
    layers: list[LayerWeights]
    embedding: LinearWeights | None
    final_norm: np.ndarray | None
    head: LinearWeights | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, shared ones counted once."""
        linears = {id(w): w for w in (self.embedding, self.head) if w is not None}
        total = sum(w.nbytes for w in linears.values())
        total += 0 if self.final_norm is None else self.final_norm.nbytes
        for layer in self.layers:
            a, m = layer.attention, layer.mlp
            total += sum(w.nbytes for w in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down))
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
    """Arrays that every layer of a stage writes in turn, allocated once for ``max_rows`` rows; unused rows take no memory."""

    def __init__(self, config: ModelConfig, share: TensorShare, quantized: bool, cache: KVCache, reducer: TensorReducer,
                 max_rows: int, max_outputs: int, max_seq_len: int):
        self.config, self.cache, self.max_rows = config, cache, max_rows
        self.heads, self.kv_heads, ffn = len(share.query_heads), len(share.kv_heads), len(share.ffn)
        def floats(columns: int) -> np.ndarray:
            return aligned((max_rows, columns), np.float32)
        self.residual = floats(config.hidden_size)
        # One for attention, one for the MLP: a rank may still read the sums of one while others write to the next.
        sums = aligned((max_rows, config.hidden_size), np.int64)
        self.sums = [reducer.region(sums) for _ in range(2)]
        self.normed = Activation(max_rows, config.hidden_size, BLOCK, quantized)
        self.q, self.k, self.v = (floats(n * config.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        self.attended = Activation(max_rows, self.heads * config.head_dim, min(config.head_dim, BLOCK), quantized)
        self.gated = Activation(max_rows, ffn, down_block(config.intermediate_size), quantized)
        self.cosines, self.sines = rope.tables(config, max_seq_len)
        self.tokens, self.sequences, self.positions = (np.zeros(max_rows, np.int32) for _ in range(3))
        self.selected, self.runs = np.zeros(max_outputs, np.int64), np.zeros((max_rows, 2), np.int32)
        per_kv = config.num_heads // config.kv_heads
        first = share.query_heads.start
        # Query heads before the first of KV head j of this rank, which may hold a part of its query heads only.
        self.head_starts = np.array([min(max(per_kv * j - first, 0), self.heads)
                                     for j in range(share.kv_heads.start, share.kv_heads.stop + 1)], np.int32)
        self.eps = np.array([config.norm_eps])
        self.scale = np.array([1.0 / np.sqrt(np.float64(config.head_dim))]).astype(np.float32)

    def load(self, batch: Batch, steps: Steps) -> None:
        """Takes over what a step works on."""
        rows, outputs = batch.rows, len(batch.outputs)
        self.tokens[:rows], self.sequences[:rows] = batch.tokens[:rows], batch.sequences[:rows]
        self.positions[:rows], self.selected[:outputs] = batch.positions[:rows], batch.outputs
        steps.counts[:] = rows, outputs, attention_kernel.runs_of(self.sequences, self.positions, rows, self.runs)

    def add_norm(self, steps: Steps, weight: np.ndarray, target: Activation, rows: np.ndarray, name: str, layer: int = 0,
                 selected: np.ndarray | None = None) -> None:
        """Appends target = RMS norm of the residual (its rows ``selected``, if given), ready for products."""
        steps.program.add((layer, (name,)), elementwise.norm_operation, elementwise.NORM, ONE_TASK.record(steps.pool.threads),
                          rows=rows, residual=self.residual, stride=self.residual.shape[1], columns=self.residual.shape[1],
                          weight=weight, eps=self.eps, selected=selected, target=target.record, keep=(target,))


def make_cache(config: ModelConfig, stage: StageShare, share: TensorShare, weights: StageWeights, sequences: int,
               max_seq_len: int, pages: int | None = None) -> KVCache:
    """The KV cache of one rank, see ``KVCache``. Not collective."""
    return KVCache(stage.layers, len(share.kv_heads), config.head_dim, sequences, max_seq_len,
                   np.uint16 if weights.half_cache else np.float32, pages)


class TransformerStage:
    """The part of a model that one rank computes. Making one, and ``forward``, are collective over the tensor group.

    ``cache``: made already by ``make_cache`` for the same sizes, so that no rank fails here alone for want of memory.
    """

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights: StageWeights, reducer: TensorReducer,
                 pool: Pool, *, sequences: int, max_seq_len: int, max_rows: int, max_outputs: int, pages: int | None = None,
                 schedule: str = "steal", cache: KVCache | None = None):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        self.faults = Faults()
        self.cache = cache or make_cache(config, stage, share, weights, sequences, max_seq_len, pages)
        self.buffers = Buffers(config, share, weights.quantized, self.cache, reducer, max_rows, max_outputs, max_seq_len)
        pool.need_scratch(attention_kernel.scratch_bytes(max_seq_len, config.head_dim, config.num_heads // config.kv_heads))
        self.steps = Steps(pool, reducer, self.faults, schedule)
        self.logits = np.zeros((max_outputs if stage.last else 0, len(share.vocabulary)), np.float32)
        if stage.first:
            self._add_embedding()
        self.layers = [ParallelLayer(number, layer, self.buffers)
                       for number, layer in zip(stage.layers, weights.layers, strict=True)]
        for layer in self.layers:
            layer.add(self.steps)
        if stage.last:
            self._add_head(max_outputs)

    @property
    def residual(self) -> np.ndarray:
        """float32 [max_rows, hidden_size]: what enters the stage (received before ``forward``) and what leaves it."""
        return self.buffers.residual

    def forward(self, batch: Batch) -> None:
        """Runs the stage's layers on the residual; on the last stage also the logits [outputs, vocabulary of this rank]."""
        self.buffers.load(batch, self.steps)
        self.steps.run()

    def _add_embedding(self) -> None:
        table, b, steps = self.weights.embedding.weights, self.buffers, self.steps
        rows = self.reducer.region(b.residual)
        forms = {"halves": elementwise.INT8, "nibble": elementwise.INT4, "f32": elementwise.FLOAT32, "f16": elementwise.FLOAT16}
        steps.program.add((0, ("embedding",)), elementwise.embedding_operation, elementwise.EMBEDDING,
                          ONE_TASK.record(steps.pool.threads), rows=steps.rows, tokens=b.tokens,
                          first=self.share.vocabulary.start, held=table.rows, columns=self.config.hidden_size, data=table.data,
                          tile_bytes=table.data.strides[1], form=forms[table.layout], out=rows.own, stride=b.residual.shape[1])
        if self.reducer.size > 1:
            steps.join(rows, joining.BITS, steps.rows, b.residual)

    def _add_head(self, max_outputs: int) -> None:
        """Logits of this rank's vocabulary, and what sampling needs of the whole one: the largest logit, the sum of weights."""
        b, head, steps = self.buffers, self.weights.head, self.steps
        selected = Activation(max_outputs, self.config.hidden_size, BLOCK, head.weights.quantized)
        b.add_norm(steps, self.weights.final_norm, selected, steps.outputs, "final_norm", selected=b.selected)
        ColumnParallelLinear(0, {"head": head}).add(steps, selected, {"head": self.logits}, steps.outputs)
        tiles = -(-self.config.vocab_size // (VOCABULARY_TILE * self.reducer.size))
        segments = -(-tiles * VOCABULARY_TILE // sampling.SEGMENT)      # of the rank that holds most
        self.best, self.totals = (np.zeros((max_outputs, segments), np.int64) for _ in range(2))
        best, totals = self.reducer.region(self.best), self.reducer.region(self.totals)
        fields = {"rows": steps.outputs, "logits": self.logits, "stride": self.logits.shape[1], "columns": self.logits.shape[1],
                  "first": self.share.vocabulary.start, "segments": segments, "best": self.best, "totals": self.totals}
        work = ONE_TASK.record(steps.pool.threads)
        steps.program.add((0, ()), sampling.best_operation, sampling.LOGITS, work, **fields | {"best": best.own})
        if self.reducer.size > 1:
            steps.join(best, joining.MAXIMUM, steps.outputs, self.best)
        steps.program.add((0, ()), sampling.totals_operation, sampling.LOGITS, work, **fields | {"totals": totals.own})
        if self.reducer.size > 1:
            steps.join(totals, joining.SUM, steps.outputs, self.totals)
