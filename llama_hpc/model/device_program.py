"""What a step of a stage runs on a GPU: launch after launch, fixed but for bounds, recorded once for each and replayed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_hpc.kernels.cuda import activations, attention, kv_store, products, sampling
from llama_hpc.kernels.cuda.activations import Activation
from llama_hpc.kernels.cuda.products import Part
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, BLOCK, down_block
from llama_hpc.kernels.sampling import SEGMENT
from llama_hpc.model import rope
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.device_cache import DeviceCache
from llama_hpc.model.device_step import DeviceOutputs, DeviceStep, StepArrays
from llama_hpc.model.shares import VOCABULARY_TILE, StageShare, TensorShare

GRAPH_ROWS = 64                 # steps of so many rows at most are captured as graphs and replayed
_SCRATCH_BYTES = 256 << 20      # of attention, or what one row needs


@dataclass(frozen=True)
class Bounds:
    """What a recorded step can do at most: rows, outputs, positions of a sequence, and rows that follow one another in one
    sequence."""

    rows: int
    outputs: int
    positions: int
    longest: int

    @classmethod
    def of(cls, batch, most: "Bounds") -> "Bounds":
        """The bounds under which a step is recorded: few different ones, not far above what it needs, not above ``most``."""
        rows, positions = batch.rows, int(batch.positions[: batch.rows].max()) + 1
        alone = rows == len(set(batch.sequences[:rows].tolist()))
        def above(count: int, limit: int) -> int:
            return min(count if count <= 4 or count > GRAPH_ROWS else -(-count // 8) * 8, limit)
        blocks = 1 << (-(-positions // ATTENTION_BLOCK) - 1).bit_length()
        return cls(above(rows, most.rows), above(len(batch.outputs), most.outputs), blocks * ATTENTION_BLOCK,
                   1 if alone else above(rows, most.rows))


class DeviceProgram:
    """The launches of a stage, on arrays that are made once. Parameters as for ``DeviceStage``.

    ``names``: layer and tensors of each operation. ``replayed``: how many steps were. ``place``: the piece of a step that was
    launched last.
    """

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights, reducer, device, cache: DeviceCache,
                 exchange, max_seq_len: int, max_rows: int, max_outputs: int):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        self.device, self.cache, self.exchange = device, cache, exchange
        self.most = Bounds(max_rows, max_outputs, max_seq_len, max_rows)
        self.names: list[tuple[int, tuple[str, ...]]] = []
        self.replayed, self.place = 0, 0
        self._buffers()
        self.outputs = self._make_outputs() if stage.last else None
        # Between two pieces the tensor group joins on the host.
        self._pieces: list[tuple[list[Callable[[Bounds], None]], Callable[[int], None] | None]] = [([], None)]
        self._build()
        self.status = device.zeros((max(1, len(self.names)),), np.int32)
        self._recorded: dict[Bounds, list[Any]] = {}
        self._step: DeviceStep | None = None        # the one that is being launched

    @property
    def arrays(self) -> StepArrays:
        """What steps bring to the device and take from it."""
        return StepArrays(self._given, self._residual, self.status, self.outputs)

    def run(self, batch, step: DeviceStep) -> None:
        """Launches what a batch needs that ``step`` has loaded; returns when the host has joined what it joins."""
        bounds, self._step = Bounds.of(batch, self.most), step
        replayed = bounds.rows <= GRAPH_ROWS
        if replayed and bounds not in self._recorded:
            self._recorded[bounds] = [self._record(launches, bounds) for launches, _ in self._pieces]
        self.replayed += replayed
        for number, (launches, join) in enumerate(self._pieces):
            self.place = number + 1
            if replayed:
                self.device.replay(self._recorded[bounds][number])
            else:
                for launch in launches:
                    launch(bounds)
            if join is not None:
                join(step.rows)

    def _record(self, launches: list[Callable[[Bounds], None]], bounds: Bounds) -> Any:
        with self.device.capture() as recorded:
            for launch in launches:
                launch(bounds)
        return recorded

    def _join_sums(self, rows: int, any_input: bool) -> None:
        """The fixed-point sums of a row-parallel product; a rank without inputs adds nothing."""
        if not any_input:
            self.device.upload(np.zeros((rows, self._sums.shape[1]), np.int64), self._sums[:rows])
        self.exchange.sum_fixed(self._sums[:rows], self._host_sums[:rows])

    # Building.

    def _buffers(self) -> None:
        config, share, device, most, rows = self.config, self.share, self.device, self.most, self.most.rows
        quantized, hidden, ffn = self.weights.quantized, config.hidden_size, len(share.ffn)
        self.heads, self.kv_heads = len(share.query_heads), len(share.kv_heads)
        self._residual = device.zeros((rows, hidden), np.float32)
        self._sums = device.zeros((rows if self.reducer.size > 1 else 0, hidden), np.int64)
        self._host_sums = device.pinned(self._sums.shape, np.int64)
        self._normed = Activation(device, rows, hidden, BLOCK, quantized)
        self._q, self._k, self._v = (device.zeros((rows, n * config.head_dim), np.float32)
                                     for n in (self.heads, self.kv_heads, self.kv_heads))
        self._attended = Activation(device, rows, self.heads * config.head_dim, min(config.head_dim, BLOCK), quantized)
        self._gated = Activation(device, rows, ffn, down_block(config.intermediate_size), quantized)
        self._cosines, self._sines = map(device.upload, rope.tables(config, most.positions))
        self._product_scratch = products.Scratch(device, max(
            (self.heads + 2 * self.kv_heads) * config.head_dim, 2 * ffn, hidden, len(share.vocabulary) if self.stage.last else 0))
        blocks = 1 << (-(-most.positions // ATTENTION_BLOCK) - 1).bit_length()
        at_a_time = max(1, _SCRATCH_BYTES // (4 * self.heads * blocks * (config.head_dim + 18)))
        self._scratch = attention.Scratch(device, min(rows, at_a_time), blocks, self.heads, config.head_dim,
                                          -(-config.num_heads // config.kv_heads))
        # See ``DeviceStep``.
        self._given = device.zeros((2 + 3 * rows + most.outputs,), np.int32)
        per_kv = config.num_heads // config.kv_heads
        first = share.group_heads.start
        starts = [min(max(per_kv * j - first, 0), self.heads) for j in range(share.kv_heads.start, share.kv_heads.stop + 1)]
        self._head_starts = device.upload(np.array(starts, np.int32))
        self._scale = float(np.float32(1.0 / np.sqrt(np.float64(config.head_dim))))

    def _make_outputs(self) -> DeviceOutputs:
        tiles = -(-self.config.vocab_size // (VOCABULARY_TILE * self.reducer.size))
        segments = -(-tiles * VOCABULARY_TILE // SEGMENT)       # of the rank that holds most
        outputs = DeviceOutputs(self.device, self.most.outputs, self.share.vocabulary, segments, self._view(1, 1),
                                draws=self.reducer.size == 1)
        self._selected = Activation(self.device, self.most.outputs, self.config.hidden_size, BLOCK,
                                    self.weights.head.weights.quantized)
        return outputs

    def _view(self, first: int, count: int):
        return self._given[first : first + count]

    def _add(self, operation: Callable[..., None], layer: int = 0, *tensors: str) -> None:
        """Appends ``operation(bounds, status)``, which is named after tensors."""
        number = len(self.names)
        self.names.append((layer, tensors))
        self._pieces[-1][0].append(lambda bounds: operation(bounds, self.status[number : number + 1]))

    def _exchange(self, join: Callable[[int], None]) -> None:
        """Ends the piece here: ``join(rows)`` runs on the host, then the next one."""
        self._pieces[-1] = self._pieces[-1][0], join
        self._pieces.append(([], None))

    def _build(self) -> None:
        rows = self.most.rows
        self._rows, self._count = self._view(0, 1), self._view(1, 1)
        self._tokens, self._sequences, self._positions = (self._view(2 + i * rows, rows) for i in range(3))
        self._chosen = self._view(2 + 3 * rows, self.most.outputs)
        if self.stage.first:
            self._add_embedding()
        for number, layer in zip(self.stage.layers, self.weights.layers, strict=True):
            self._add_attention(number, layer)
            self._add_mlp(number, layer)
        if self.stage.last:
            self._add_head()

    def _add_embedding(self) -> None:
        table, vocabulary = self.weights.embedding.weights, self.share.vocabulary
        self._add(lambda most, status: products.embedding(self.device, table, self._tokens, vocabulary.start, len(vocabulary),
                                                          self._rows, most.rows, self._residual), 0, "embedding")
        if self.reducer.size > 1:
            self._exchange(lambda rows: self.exchange.sum_disjoint(self._residual[:rows], self._step.residual[:rows]))

    def _add_norm(self, weight: np.ndarray, number: int, name: str) -> None:
        weight, eps = self.device.upload(weight), self.config.norm_eps
        self._add(lambda most, status: activations.rms_norm(self.device, self._residual, weight, eps, self._normed, self._rows,
                                                            most.rows, status), number, name)

    def _part(self, linear, out) -> Part:
        return Part(linear.weights, out, self.device.upload(linear.bias) if linear.bias.size else None)

    def _add_product(self, number: int, x: Activation, linears: dict[str, tuple[Any, Any]], mode: int, gated=None) -> None:
        parts = [self._part(linear, out) for linear, out in linears.values() if linear.weights.rows]
        if parts:
            self._add(lambda most, status: products.product(self.device, x, parts, self._rows, most.rows, mode, status, gated,
                                                           self._product_scratch), number, *linears)

    def _add_row_parallel(self, number: int, name: str, linear, x: Activation) -> None:
        """residual += x Wᵀ + b, over the tensor group."""
        if self.reducer.size == 1:
            self._add_product(number, x, {name: (linear, self._residual)}, products.ADD)
            return
        bias = self.device.upload(linear.bias) if linear.bias.size else None
        if linear.weights.blocks.size:
            part = Part(linear.weights, self._sums, None)
            self._add(lambda most, status: products.product(self.device, x, [part], self._rows, most.rows, products.SUMS, status,
                                                           scratch=self._product_scratch), number, name)
        self._exchange(lambda rows: self._join_sums(rows, bool(linear.weights.blocks.size)))
        self._add(lambda most, status: products.finish(self.device, self._sums, self._rows, most.rows, self._residual, bias,
                                                       status), number, name)

    def _add_attention(self, number: int, layer) -> None:
        a, config, device, cache = layer.attention, self.config, self.device, self.cache
        self._add_norm(layer.attention_norm, number, "attention_norm")
        self._add_product(number, self._normed, {"q": (a.q, self._q), "k": (a.k, self._k), "v": (a.v, self._v)}, products.FLOAT)
        norms = [None if norm is None else device.upload(norm) for norm in (a.q_norm, a.k_norm)]
        pools = cache.pools(number)
        names = ("q_norm", "k_norm") if a.q_norm is not None else ("k",)
        self._add(lambda most, status: kv_store.rotate_and_store(
            device, self._q, self._k, self._v, self._cosines, self._sines, self._sequences, self._positions, cache.table,
            heads=self.heads, kv_heads=self.kv_heads, head_dim=config.head_dim, rows=self._rows, most=most.rows, status=status,
            q_norm=norms[0], k_norm=norms[1], eps=config.norm_eps, **pools), number, *names)
        self._add(lambda most, status: attention.attention(
            device, self._q, pages=cache.table, sequences=self._sequences, positions=self._positions,
            head_starts=self._head_starts, kv_heads=self.kv_heads, head_dim=config.head_dim, window=config.window(number),
            scale=self._scale, target=self._attended, rows=self._rows, most=most.rows, most_positions=most.positions,
            scratch=self._scratch, status=status, longest=most.longest, **pools), number, "attention")
        self._add_row_parallel(number, "o", a.o, self._attended)

    def _add_mlp(self, number: int, layer) -> None:
        mlp = layer.mlp
        self._add_norm(layer.mlp_norm, number, "mlp_norm")
        self._add_product(number, self._normed, {"gate": (mlp.gate, None), "up": (mlp.up, None)}, products.GATED, self._gated)
        self._add_row_parallel(number, "down", mlp.down, self._gated)

    def _add_head(self) -> None:
        """The logits of this rank's vocabulary, and what sampling needs of all: the largest logit, the sum of weights."""
        device, count, found, eps = self.device, self._count, self.outputs, self.config.norm_eps
        weight, parts = device.upload(self.weights.final_norm), [self._part(self.weights.head, found.logits)]

        def add(operation: Callable[..., None], *tensors: str) -> None:
            self._add(lambda most, status: operation(most.outputs, status) if most.outputs else None, 0, *tensors)

        def join(how: str, which: str) -> None:
            def run(_: int) -> None:
                count = self._step.outputs
                getattr(self.exchange, how)(getattr(found, which)[:count], getattr(self._step, which)[:count])
            if self.reducer.size > 1:
                self._exchange(run)
        add(lambda most, status: activations.rms_norm(device, self._residual, weight, eps, self._selected, count, most, status,
                                                      self._chosen), "final_norm")
        add(lambda most, status: products.product(device, self._selected, parts, count, most, products.FLOAT, status,
                                                  scratch=self._product_scratch), "head")
        add(lambda most, status: sampling.find_best(device, found.logits, found.first_token, count, most, found.best))
        join("maximum", "best")
        add(lambda most, status: sampling.find_totals(device, found.logits, found.best, count, most, found.totals))
        join("sum_fixed", "totals")
