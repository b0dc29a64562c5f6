"""One stage of a model on a GPU: the same steps as ``transformer.TransformerStage``, by the kernels of ``kernels.cuda``.

What the engine sees of a stage lies on the host: residuals that travel between stages, logits that are asked for, the largest
logits and sums of weights. Nothing here needs Numba or MPI.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_hpc.errors import DeviceUnavailable
from llama_hpc.kernels.cuda import activations, attention, kv_store, products, sampling
from llama_hpc.kernels.cuda.activations import Activation
from llama_hpc.kernels.cuda.device import DeviceError
from llama_hpc.kernels.cuda.products import Part
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, BLOCK, NOT_FINITE, down_block
from llama_hpc.kernels.sampling import SEGMENT
from llama_hpc.model import rope
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.device_cache import DeviceCache
from llama_hpc.model.device_draws import DeviceDraws
from llama_hpc.model.faults import Faults
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


class DeviceStage:
    """The part of a model that one rank computes on ``device`` (see ``kernels.cuda.device``). Collective over the tensor group.

    Sizes and ``weights`` are as for ``TransformerStage``, the weights' matrices on the device. ``reducer`` counts what is joined
    over the tensor group; with several ranks ``exchange`` does it (see ``comm.device_exchange``).
    """

    spread_steps = overlapped_steps = 0

    def __init__(self, config: ModelConfig, stage: StageShare, share: TensorShare, weights, reducer, device, *, sequences: int,
                 max_seq_len: int, max_rows: int, max_outputs: int, cache: DeviceCache, exchange=None):
        self.config, self.stage, self.share, self.weights, self.reducer = config, stage, share, weights, reducer
        self.device, self.cache, self.exchange, self.faults = device, cache, exchange, Faults()
        self.max_rows, self.max_outputs = max_rows, max_outputs
        self._most = Bounds(max_rows, max_outputs, max_seq_len, max_rows)
        self.replayed_steps = 0
        self._names: list[tuple[int, tuple[str, ...]]] = []
        self._buffers(max_seq_len)
        self._outputs()
        # Between two pieces the tensor group joins on the host.
        self._pieces: list[tuple[list[Callable[[Bounds], None]], Callable[[int], None] | None]] = [([], None)]
        self._build()
        self.status = device.zeros((max(1, len(self._names)),), np.int32)
        self._found = device.pinned((max(1, len(self._names)),), np.int32)
        self._recorded: dict[Bounds, list[Any]] = {}
        # Where a rank has all logits, tokens are chosen beside them.
        whole = stage.last and reducer.size == 1
        self.draws = DeviceDraws(device, self._logits, self._best, self._totals) if whole else None
        self._place = 0

    # What the engine asks of a stage.

    def forward(self, batch) -> None:
        """As ``TransformerStage.forward``: runs the stage's layers on the residual. Raises DeviceUnavailable where the device is
        lost."""
        try:
            self._forward(batch)
        except DeviceError as error:
            raise DeviceUnavailable(f"{error}; --resume goes on with what is finished, on other devices too") from None

    def _forward(self, batch) -> None:
        rows, outputs = batch.rows, len(batch.outputs)
        self._load(batch, rows, outputs)
        if not self.stage.first:
            self.device.upload(self.residual[:rows], self._residual[:rows])
        self._run(Bounds.of(batch, self._most), rows)
        self._finish(rows, outputs)

    @property
    def logits(self) -> np.ndarray:
        """float32 [max_outputs, vocabulary of this rank]; brought to the host when somebody asks."""
        if self._fresh:
            self.device.download(self._logits[: self._fresh], self._host_logits[: self._fresh])
            self._fresh = 0
        return self._host_logits

    def work(self) -> dict[str, str | int | float]:
        """What was joined over the tensor group and how, how many steps were replayed, and tokens chosen on the device."""
        chosen = {} if self.exchange is None else {"reduce": self.exchange.name}
        return self.reducer.work() | chosen | {"replayed_steps": self.replayed_steps,
                                                   "device_draws": self.draws.count if self.draws else 0}

    @property
    def joining(self) -> list[np.ndarray]:
        """Nanoseconds spent in joins, int64 [1]."""
        return [self.reducer.nanoseconds]

    def mark(self) -> tuple[int, ...]:
        """Changes while a step gets further. From any thread."""
        return (self._place,)

    def reached(self) -> str:
        """Where the step is; kernels run beside the host, which waits for all of a piece."""
        return f"piece {self._place} of the step on {self.device.name}" if self._place else ""

    def free(self) -> None:
        """Gives back what the ranks share. Collective over the tensor group."""
        self.reducer.free()

    # Building: what runs is fixed, but for the bounds.

    def _buffers(self, max_seq_len: int) -> None:
        config, share, device, rows = self.config, self.share, self.device, self.max_rows
        quantized, hidden, ffn = self.weights.quantized, config.hidden_size, len(share.ffn)
        self.heads, self.kv_heads = len(share.query_heads), len(share.kv_heads)
        self.residual = device.pinned((rows, hidden), np.float32)
        self._residual = device.zeros((rows, hidden), np.float32)
        self._sums = device.zeros((rows if self.reducer.size > 1 else 0, hidden), np.int64)
        self._host_sums = device.pinned(self._sums.shape, np.int64)
        self._normed = Activation(device, rows, hidden, BLOCK, quantized)
        self._q, self._k, self._v = (device.zeros((rows, n * config.head_dim), np.float32)
                                     for n in (self.heads, self.kv_heads, self.kv_heads))
        self._attended = Activation(device, rows, self.heads * config.head_dim, min(config.head_dim, BLOCK), quantized)
        self._gated = Activation(device, rows, ffn, down_block(config.intermediate_size), quantized)
        self._cosines, self._sines = map(device.upload, rope.tables(config, max_seq_len))
        self._product_scratch = products.Scratch(device, max(
            (self.heads + 2 * self.kv_heads) * config.head_dim, 2 * ffn, hidden, len(share.vocabulary) if self.stage.last else 0))
        blocks = 1 << (-(-max_seq_len // ATTENTION_BLOCK) - 1).bit_length()
        at_a_time = max(1, _SCRATCH_BYTES // (4 * self.heads * blocks * (config.head_dim + 18)))
        self._scratch = attention.Scratch(device, min(rows, at_a_time), blocks, self.heads, config.head_dim,
                                          -(-config.num_heads // config.kv_heads))
        # Of a step: counts of rows and of outputs, then row by row token, sequence and position, then the selected rows.
        self._given = device.pinned(2 + 3 * rows + self.max_outputs, np.int32)
        self._step = device.zeros(self._given.shape, np.int32)
        per_kv = config.num_heads // config.kv_heads
        first = share.group_heads.start
        starts = [min(max(per_kv * j - first, 0), self.heads) for j in range(share.kv_heads.start, share.kv_heads.stop + 1)]
        self._head_starts = device.upload(np.array(starts, np.int32))
        self._scale = float(np.float32(1.0 / np.sqrt(np.float64(config.head_dim))))

    def _outputs(self) -> None:
        """Arrays of the last stage."""
        device, held = self.device, len(self.share.vocabulary)
        outputs = self.max_outputs if self.stage.last else 0
        self._fresh, self._host_logits = 0, device.pinned((outputs, held), np.float32)
        tiles = -(-self.config.vocab_size // (VOCABULARY_TILE * self.reducer.size))
        segments = -(-tiles * VOCABULARY_TILE // SEGMENT)       # of the rank that holds most
        self._logits = device.zeros((outputs, held), np.float32)
        self._best, self._totals = (device.zeros((outputs, segments), np.int64) for _ in range(2))
        self.best, self.totals = (device.pinned((outputs, segments), np.int64) for _ in range(2))
        if self.stage.last:
            self._selected = Activation(device, outputs, self.config.hidden_size, BLOCK,
                                        self.weights.head.weights.quantized)

    def _view(self, first: int, count: int):
        return self._step[first : first + count]

    def _add(self, operation: Callable[..., None], layer: int = 0, *tensors: str) -> None:
        """Appends ``operation(bounds, status)``, which is named after tensors."""
        number = len(self._names)
        self._names.append((layer, tensors))
        self._pieces[-1][0].append(lambda bounds: operation(bounds, self.status[number : number + 1]))

    def _exchange(self, join: Callable[[int], None]) -> None:
        """Ends the piece here: ``join(rows)`` runs on the host, then the next one."""
        self._pieces[-1] = self._pieces[-1][0], join
        self._pieces.append(([], None))

    def _build(self) -> None:
        rows = self.max_rows
        self._rows, self._count = self._view(0, 1), self._view(1, 1)
        self._tokens, self._sequences, self._positions = (self._view(2 + i * rows, rows) for i in range(3))
        self._chosen = self._view(2 + 3 * rows, self.max_outputs)
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
            self._exchange(lambda rows: self.exchange.sum_disjoint(self._residual[:rows], self.residual[:rows]))

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
        device, count, eps = self.device, self._count, self.config.norm_eps
        weight, parts = device.upload(self.weights.final_norm), [self._part(self.weights.head, self._logits)]

        def add(operation: Callable[..., None], *tensors: str) -> None:
            self._add(lambda most, status: operation(most.outputs, status) if most.outputs else None, 0, *tensors)

        def join(values, host: np.ndarray, name: str) -> None:
            if self.reducer.size > 1:
                self._exchange(lambda rows: getattr(self.exchange, name)(values[: self._fresh], host[: self._fresh]))
        add(lambda most, status: activations.rms_norm(device, self._residual, weight, eps, self._selected, count, most, status,
                                                      self._chosen), "final_norm")
        add(lambda most, status: products.product(device, self._selected, parts, count, most, products.FLOAT, status,
                                                  scratch=self._product_scratch), "head")
        add(lambda most, status: sampling.find_best(device, self._logits, self.share.vocabulary.start, count, most, self._best))
        join(self._best, self.best, "maximum")
        add(lambda most, status: sampling.find_totals(device, self._logits, self._best, count, most, self._totals))
        join(self._totals, self.totals, "sum_fixed")

    # Running.

    def _load(self, batch, rows: int, outputs: int) -> None:
        """Takes over what a step works on."""
        given = self._given
        given[:2] = rows, outputs
        for i, values in enumerate((batch.tokens, batch.sequences, batch.positions)):
            given[2 + i * self.max_rows : 2 + i * self.max_rows + rows] = values[:rows]
        given[len(given) - self.max_outputs :][:outputs] = batch.outputs
        self.device.upload(given, self._step)
        self.cache.update()
        self._fresh = outputs

    def _run(self, bounds: Bounds, rows: int) -> None:
        replayed = bounds.rows <= GRAPH_ROWS
        if replayed and bounds not in self._recorded:
            self._recorded[bounds] = [self._record(launches, bounds) for launches, _ in self._pieces]
        self.replayed_steps += replayed
        for number, (launches, join) in enumerate(self._pieces):
            self._place = number + 1
            if replayed:
                self.device.replay(self._recorded[bounds][number])
            else:
                for launch in launches:
                    launch(bounds)
            if join is not None:
                join(rows)

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

    def _finish(self, rows: int, outputs: int) -> None:
        """Brings to the host what everybody asks for, and notes the first fault."""
        device = self.device
        if not self.stage.last:
            device.fetch(self._residual[:rows], self.residual[:rows])
        elif outputs:
            device.fetch(self._best[:outputs], self.best[:outputs])
            device.fetch(self._totals[:outputs], self.totals[:outputs])
        device.fetch(self.status, self._found)
        device.synchronize()
        self._place = 0
        if not self._found.any():
            return
        for number in np.flatnonzero(self._found).tolist():
            layer, tensors = self._names[number]
            # Both bits: not finite, which comes first.
            self.faults.note(NOT_FINITE if self._found[number] & NOT_FINITE else int(self._found[number]), tensors[0], layer)
        device.upload(np.zeros_like(self._found), self.status)
