"""One stage of a model on one tensor rank: embedding, layers, output head, and the buffers they share."""

from dataclasses import dataclass
from math import prod

import numpy as np

from llama_hpc.comm.reduce import Region, TensorReducer, own_rows
from llama_hpc.kernels.cpu import attention as attention_kernel
from llama_hpc.kernels.cpu import elementwise, joining, sampling
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.memory import address, aligned
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
from llama_hpc.kernels.numerics import BLOCK, down_block
from llama_hpc.model import rope
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.context import NO_CONTEXT, ContextGroup
from llama_hpc.model.faults import Faults
from llama_hpc.model.kv_cache import DTYPES, KVCache
from llama_hpc.model.layer import LayerWeights, ParallelLayer
from llama_hpc.model.linear import ColumnParallelLinear, LinearWeights
from llama_hpc.model.overlap import OverlappedSteps
from llama_hpc.model.shares import VOCABULARY_TILE, StageShare, TensorShare
from llama_hpc.model.steps import Steps
from llama_hpc.model.wanted import NOTHING, Wanted


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds: ``embedding`` on the first stage, ``final_norm`` and ``head`` on the last (None elsewhere).

    ``quantized`` tells whether projections multiply integers, ``kv_cache`` how keys and values are kept unless a stage is told
    otherwise. With tied embeddings both are the same object.
    """

    quantized: bool
    kv_cache: str
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
                 max_rows: int, max_outputs: int, tables: tuple[np.ndarray, np.ndarray], spread: bool = False,
                 context: TensorReducer | None = None):
        self.config, self.cache, self.max_rows = config, cache, max_rows
        self.heads, self.kv_heads, ffn = len(share.query_heads), len(share.kv_heads), len(share.ffn)
        def floats(columns: int) -> np.ndarray:
            return aligned((max_rows, columns), np.float32)
        self.residual = floats(config.hidden_size)
        # One for attention, one for the MLP: a rank may still read the sums of one while others write to the next.
        sums = aligned((max_rows, config.hidden_size), np.int64)
        self.sums = [reducer.region(sums) for _ in range(2)]
        self.normed = self.spread_normed = Activation(max_rows, config.hidden_size, BLOCK, quantized)
        self.residual_region = Region(self.residual, np.array([address(self.residual)]))
        if spread:
            self._share_rows(reducer, quantized)
        self.q, self.k, self.v = (floats(n * config.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        self.attended = Activation(max_rows, self.heads * config.head_dim, min(config.head_dim, BLOCK), quantized)
        self.gated = Activation(max_rows, ffn, down_block(config.intermediate_size), quantized)
        self.cosines, self.sines = tables
        self.tokens, self.sequences, self.positions = (np.zeros(max_rows, np.int32) for _ in range(3))
        self.selected, self.runs = np.zeros(max_outputs, np.int64), np.zeros((max_rows, 2), np.int32)
        per_kv = config.num_heads // config.kv_heads
        first, heads = share.group_heads.start, len(share.group_heads)
        # Query heads before the first of KV head j of this rank, which may hold a part of its query heads only.
        self.head_starts = np.array([min(max(per_kv * j - first, 0), heads)
                                     for j in range(share.kv_heads.start, share.kv_heads.stop + 1)], np.int32)
        self.eps = np.array([config.norm_eps])
        self.scale = np.array([1.0 / np.sqrt(np.float64(config.head_dim))]).astype(np.float32)
        self.context = ContextGroup(config.head_dim, share, cache, context, max_rows) if share.context > 1 else None

    def _share_rows(self, reducer: TensorReducer, quantized: bool) -> None:
        """For ranks that share memory: a residual that others can read, and normed rows that all write together."""
        self.residual_region = reducer.region(self.residual)
        self.residual = self.residual_region.own
        if reducer.shares_memory:
            def common(shape: tuple[int, ...], dtype) -> np.ndarray:
                return reducer.common(prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
            self.spread_normed = Activation(self.max_rows, self.config.hidden_size, BLOCK, quantized, common)

    def load(self, batch: Batch, steps: Steps) -> None:
        """Takes over what a step works on."""
        rows, outputs = batch.rows, len(batch.outputs)
        self.tokens[:rows], self.sequences[:rows] = batch.tokens[:rows], batch.sequences[:rows]
        self.positions[:rows], self.selected[:outputs] = batch.positions[:rows], batch.outputs
        runs = attention_kernel.runs_of(self.sequences, self.positions, rows, self.runs)
        own = own_rows(rows, steps.reducer.comm.rank, steps.reducer.size)
        steps.counts[:] = rows, outputs, runs, own.start, len(own)
        if self.context is not None:
            self.context.load(self.runs, runs, self.sequences, self.positions)

    def add_layer_norm(self, steps: Steps, weight: np.ndarray, name: str, layer: int) -> Activation:
        """Appends the RMS norm of the residual, and returns where it is; in ``spread`` steps each rank adds its own rows."""
        if not steps.spread:
            self.add_norm(steps, weight, self.normed, steps.rows, name, layer)
            return self.normed
        self.add_norm(steps, weight, self.spread_normed, steps.own, name, layer, offset=steps.first)
        steps.spread_out(self.spread_normed.by_rows())
        return self.spread_normed

    def add_norm(self, steps: Steps, weight: np.ndarray, target: Activation, rows: np.ndarray, name: str, layer: int = 0,
                 selected: np.ndarray | None = None, offset: np.ndarray | None = None) -> None:
        """Appends target = RMS norm of the residual (from row ``offset`` on, or its rows ``selected``), ready for products."""
        steps.program.add((layer, (name,)), elementwise.norm_operation, elementwise.NORM, ONE_TASK.record(steps.pool.threads),
                          rows=rows, residual=self.residual, stride=self.residual.shape[1], columns=self.residual.shape[1],
                          weight=weight, eps=self.eps, selected=selected, offset=offset, target=target.record,
                          keep=(target,))


def make_cache(config: ModelConfig, stage: StageShare, share: TensorShare, weights: StageWeights, sequences: int,
               max_seq_len: int, pages: int | None = None, kv_cache: str | None = None) -> KVCache:
    """The KV cache of one rank, see ``KVCache``; ``kv_cache``: of DTYPES, or None for what suits the weights. Not collective."""
    return KVCache(stage.layers, len(share.kv_heads), config.head_dim, sequences, max_seq_len,
                   DTYPES[kv_cache or weights.kv_cache], pages, share.context)


class TransformerStage:
    """The part of a model that one rank computes. Making one, and ``forward``, are collective over the tensor group.

    ``cache``: made already by ``make_cache`` for the same sizes, so that no rank fails here alone for want of memory.
    ``context``: what joins over the ranks that deal out positions, where the share says that there are several.
    """

    draws = None                # tokens are chosen on the host
    overlaps = False            # a step has run when ``begin`` returns

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights: StageWeights, reducer: TensorReducer,
                 pool: Pool, *, sequences: int, max_seq_len: int, max_rows: int, max_outputs: int, pages: int | None = None,
                 kv_cache: str | None = None, schedule: str = "steal", spread_from: int = 0, overlap_from: int = 0,
                 cache: KVCache | None = None, context: TensorReducer | None = None):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        self.faults = Faults()
        # Rows of a step from which tensor ranks deal them out among themselves.
        self.spread_from = spread_from if spread_from and reducer.size > 1 else max_rows + 1
        self.spread_steps = 0
        self.cache = cache or make_cache(config, stage, share, weights, sequences, max_seq_len, pages, kv_cache)
        tables = rope.tables(config, max_seq_len)
        self.buffers = Buffers(config, share, weights.quantized, self.cache, reducer, max_rows, max_outputs, tables,
                               self.spread_from <= max_rows, context)
        pool.need_scratch(attention_kernel.scratch_bytes(max_seq_len, config.head_dim, config.num_heads // config.kv_heads))
        self._make_outputs(max_outputs)
        self._embedded = reducer.region(self.residual) if stage.first else None
        self.layers = [ParallelLayer(number, layer, self.buffers)
                       for number, layer in zip(stage.layers, weights.layers, strict=True)]
        self.steps = self._steps(Steps(pool, reducer, self.faults, schedule))
        self._spread = None
        if self.spread_from <= max_rows:
            self._spread = self._steps(Steps(pool, reducer, self.faults, schedule, spread=True))
        # Rows of a step from which one half is computed while sums of the other travel. In shared memory nothing travels; a
        # context group exchanges one batch at a time.
        travel = reducer.size > 1 and not reducer.shares_memory and share.context == 1
        self.overlap_from = max(2, overlap_from) if overlap_from and travel else max_rows + 1
        self.overlapped_steps, self._overlapped = 0, None
        if self.overlap_from < min(self.spread_from, max_rows + 1):
            second = Buffers(config, share, weights.quantized, self.cache, reducer, max_rows // 2, 0, tables)
            self._overlapped = OverlappedSteps(self, second, lambda: Steps(pool, reducer, self.faults, schedule))

    def _make_outputs(self, max_outputs: int) -> None:
        """Arrays of the last stage: normed outputs, logits, and for sampling the keys and sums of segments of the vocabulary."""
        self.logits = np.zeros((max_outputs if self.stage.last else 0, len(self.share.vocabulary)), np.float32)
        if self.stage.last:
            self._selected = Activation(max_outputs, self.config.hidden_size, BLOCK, self.weights.head.weights.quantized)
            tiles = -(-self.config.vocab_size // (VOCABULARY_TILE * self.reducer.size))
            segments = -(-tiles * VOCABULARY_TILE // sampling.SEGMENT)      # of the rank that holds most
            self.best, self.totals = (np.zeros((max_outputs, segments), np.int64) for _ in range(2))
            self._best, self._totals = self.reducer.region(self.best), self.reducer.region(self.totals)

    def _steps(self, steps: Steps) -> Steps:
        """All of the stage."""
        if self.stage.first:
            self.add_embedding(steps)
        for layer in self.layers:
            layer.add(steps)
        if steps.spread:
            steps.gather_residual(self.buffers.residual_region)
        if self.stage.last:
            self.add_head(steps)
        return steps

    def work(self) -> dict[str, str | int | float]:
        """What was joined, over the tensor group and over the context group."""
        group = self.buffers.context
        return self.reducer.work() | (NO_CONTEXT if group is None else group.work())

    @property
    def joining(self) -> list[np.ndarray]:
        """Nanoseconds spent in joins, int64 [1]: over the tensor group, and over the context group if there is one."""
        group = self.buffers.context
        return [self.reducer.nanoseconds] + ([] if group is None else [group.reducer.nanoseconds])

    def mark(self) -> tuple[int, ...]:
        """Changes with every operation of a step. From any thread."""
        return tuple(self.steps.pool.reached())

    def reached(self) -> str:
        """The operation that this rank came to last in a step, in words; empty before the first one. From any thread."""
        place = self.steps.pool.reached()[0]
        every = [self.steps, *filter(None, [self._spread]), *(self._overlapped.steps if self._overlapped else ())]
        return next(filter(None, (steps.find(place) for steps in every)), "")

    def free(self) -> None:
        """Gives back what ranks share, and the cache; the stage cannot be used afterwards. Collective over the tensor group."""
        self.cache.give_back(range(self.cache.own_count))
        self.reducer.free()
        if self.buffers.context is not None:
            self.buffers.context.reducer.free()

    @property
    def residual(self) -> np.ndarray:
        """float32 [max_rows, hidden_size]: what enters the stage (received before ``forward``) and what leaves it."""
        return self.buffers.residual

    @property
    def incoming(self) -> np.ndarray:
        """Where the next step's residual is received: the same array."""
        return self.buffers.residual

    def begin(self, batch: Batch, wanted: Wanted = NOTHING, fault: int = 0) -> None:
        """``forward`` behind an earlier stage with this ``fault``; all logits come to where they are ``wanted``."""
        self.faults.merge(fault)
        self.forward(batch)

    def finish(self) -> None:
        """Nothing is left to be done."""

    def picked(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n]: the logits of ``tokens`` int64 [n], of the first n outputs, 0 of those that other tensor ranks hold."""
        held = self.share.vocabulary
        own = np.flatnonzero((tokens >= held.start) & (tokens < held.stop))
        logits = np.zeros(len(tokens), np.float32)
        logits[own] = self.logits[own, tokens[own] - held.start]
        return logits

    def forward(self, batch: Batch) -> None:
        """Runs the stage's layers on the residual; on the last stage also the logits [outputs, vocabulary of this rank]."""
        if self._overlapped and self.overlap_from <= batch.rows < self.spread_from:
            self.overlapped_steps += 1
            self._overlapped.run(batch)
            return
        spread = batch.rows >= self.spread_from
        self.spread_steps += spread
        steps = self._spread if spread else self.steps
        self.buffers.load(batch, steps)
        steps.run()

    def add_embedding(self, steps: Steps) -> None:
        """Appends what fills the residual on the first stage."""
        table, b = self.weights.embedding.weights, self.buffers
        rows = self._embedded       # of which each rank has those whose tokens are in its vocabulary
        forms = {"halves": elementwise.INT8, "nibble": elementwise.INT4, "f32": elementwise.FLOAT32, "f16": elementwise.FLOAT16}
        steps.program.add((0, ("embedding",)), elementwise.embedding_operation, elementwise.EMBEDDING,
                          ONE_TASK.record(steps.pool.threads), rows=steps.rows, tokens=b.tokens,
                          first=self.share.vocabulary.start, held=table.rows, columns=self.config.hidden_size, data=table.data,
                          tile_bytes=table.data.strides[1], form=forms[table.layout], out=rows.own, stride=b.residual.shape[1])
        if self.reducer.size > 1:
            steps.join(rows, joining.BITS, steps.rows, b.residual)

    def add_head(self, steps: Steps) -> None:
        """Appends the logits of this rank's vocabulary, and what sampling needs of all: the largest logit, the sum of weights."""
        b, head = self.buffers, self.weights.head
        b.add_norm(steps, self.weights.final_norm, self._selected, steps.outputs, "final_norm", selected=b.selected)
        ColumnParallelLinear(0, {"head": head}).add(steps, self._selected, {"head": self.logits}, steps.outputs)
        fields = {"rows": steps.outputs, "logits": self.logits, "stride": self.logits.shape[1], "columns": self.logits.shape[1],
                  "first": self.share.vocabulary.start, "segments": self.best.shape[1]}
        work = ONE_TASK.record(steps.pool.threads)
        best, totals = self._best.own, self._totals.own
        steps.program.add((0, ()), sampling.best_operation, sampling.LOGITS, work, best=best, totals=totals, **fields)
        if self.reducer.size > 1:
            steps.join(self._best, joining.MAXIMUM, steps.outputs, self.best)
        steps.program.add((0, ()), sampling.totals_operation, sampling.LOGITS, work, best=self.best, totals=totals, **fields)
        if self.reducer.size > 1:
            steps.join(self._totals, joining.SUM, steps.outputs, self.totals)
