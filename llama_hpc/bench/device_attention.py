"""Speed of attention on a GPU: of one token against a copy of its memory, of a prompt against multiply-adds of float32."""

import statistics
from dataclasses import dataclass

import numpy as np

from llama_hpc.bench.device_probes import Captured, DeviceProbes, copies_for, target_cells
from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.kernels.cuda.activations import Activation
from llama_hpc.kernels.cuda.attention import Scratch, attention, most_blocks
from llama_hpc.kernels.cuda.random_weights import repeated
from llama_hpc.model.device_cache import DTYPES, DeviceCache

SHAPES = {"llama3-8b": (32, 8, 128), "llama3-70b": (64, 8, 128)}       # query heads, KV heads, columns of a head
POSITIONS = 8192
WORK = (1, 1), (16, 1), (1, 1024)         # sequences, and tokens of each
DECODE_TARGET, PREFILL_TARGET = 0.7, 0.4        # of the copy's bandwidth; of the peak at the highest clock rate
_SCRATCH_BYTES = 256 << 20
_BANK = 1 << 20


@dataclass(frozen=True)
class AttentionSpeed:
    """Attention of one layer: the last ``tokens`` of ``batch`` sequences of ``positions``. Medians over rounds of seconds and of
    shares of what probes reached in the same round. Bytes are those of keys and values; operations are multiply-adds of
    queries with keys and of weights with values, each of which counts as two. ``peak_share``: of the peak at the highest clock
    rate; ``measured_share``: of the multiply-adds that a probe reached."""

    device: str
    case: str
    kv_cache: str
    heads: str
    batch: int
    positions: int
    tokens: int
    seconds: float
    gigabytes_per_second: float
    copy_share: float
    operations_per_second: float
    peak_share: float
    measured_share: float
    target: float

    @property
    def share(self) -> float:
        """What the target is for."""
        return self.copy_share if self.tokens == 1 else self.peak_share

    @property
    def claim(self) -> str:
        """What the share is, in words."""
        return (f"attention {self.case}, {self.heads} {self.kv_cache}, {self.batch}x{self.tokens} tokens at {self.positions}, of "
                f"{'the bandwidth of copies' if self.tokens == 1 else 'the float32 peak'}")

    def as_row(self) -> tuple[str, ...]:
        return (self.case, self.kv_cache, self.heads, f"{self.batch}x{self.tokens}", str(self.positions),
                f"{self.seconds * 1e6:.1f}", f"{self.gigabytes_per_second:.0f}", f"{self.copy_share:.3f}",
                f"{self.operations_per_second / 1e12:.2f}", f"{self.peak_share:.3f}", f"{self.measured_share:.3f}",
                *target_cells(self.share, self.target))


TITLES = ("attention", "KV cache", "heads", "tokens", "positions", "us", "GB/s", "of copy", "Tflop/s", "of peak", "of measured",
          "target", "")


class DeviceAttention:
    """Attention over the cache of some layers, as many as exceed the processor's cache."""

    def __init__(self, device, probes: DeviceProbes, kv_cache: str, heads: tuple[int, int, int], batch: int, positions: int):
        self.device, self.probes, self.kv_cache, self.batch, self.positions = device, probes, kv_cache, batch, positions
        self.heads, self.kv_heads, self.head_dim = heads
        dtype = np.dtype(DTYPES[kv_cache])
        self.nbytes = batch * positions * self.kv_heads * 2 * (self.head_dim * dtype.itemsize + 2 * (dtype == np.int8))
        layers = range(copies_for(device, self.nbytes))
        self.cache = DeviceCache(device, layers, self.kv_heads, self.head_dim, batch, positions, dtype)
        rng = np.random.default_rng(3)
        order = rng.permutation(self.cache.own_count).astype(np.int32)
        self.cache.pages[:] = order.reshape(self.cache.pages.shape)
        place = device.pinned(self.cache.pages.shape, np.int32)
        self.cache.update(place)
        device.synchronize()
        for pools, numbers in ((self.cache.keys + self.cache.values, self._numbers(rng, dtype)),
                               (self.cache.key_scales + self.cache.value_scales, self._numbers(rng, np.dtype(np.uint16)) & 0xFF)):
            for pool in pools:
                flat = pool.reshape(-1)
                device.copy(repeated(device, numbers, pool.nbytes).view(pool.dtype), flat)
        device.synchronize()

    @staticmethod
    def _numbers(rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        if dtype == np.int8:
            return rng.integers(-127, 128, _BANK, np.int8)
        values = rng.standard_normal(_BANK, np.float32)
        return values if dtype == np.float32 else values.astype(np.float16).view(np.uint16)

    def measure(self, tokens: int, rounds: int) -> AttentionSpeed:
        """The last ``tokens`` of each sequence. Raises BenchmarkError where a value is out of range."""
        rows, recorded = self.batch * tokens, self._record(tokens)
        visible = sum(range(self.positions - tokens + 1, self.positions + 1))
        operations, found, nominal = 4.0 * self.batch * self.heads * self.head_dim * visible, [], self.probes.nominal_peak
        for _ in range(rounds):
            bandwidth, peak = self.probes.bandwidth(), self.probes.peak()
            seconds = recorded.seconds() / len(self.cache.keys)
            found.append((seconds, self.nbytes / seconds / 1e9, self.nbytes / seconds / bandwidth, operations / seconds,
                          operations / seconds / nominal, operations / seconds / peak))
        full = self.positions >= POSITIONS
        target = (DECODE_TARGET if tokens == 1 else PREFILL_TARGET) if full else 0.0
        return AttentionSpeed(self.device.name, "decode" if rows == self.batch else "prefill", self.kv_cache,
                              f"{self.heads}/{self.kv_heads}x{self.head_dim}", self.batch, self.positions, tokens,
                              *map(statistics.median, zip(*found, strict=True)), target)

    def _record(self, tokens: int) -> Captured:
        device, rows = self.device, self.batch * tokens
        q = np.random.default_rng(4).standard_normal((rows, self.heads * self.head_dim), np.float32)
        sequences = np.repeat(np.arange(self.batch, dtype=np.int32), tokens)
        where = np.tile(np.arange(self.positions - tokens, self.positions, dtype=np.int32), self.batch)
        starts = np.arange(self.kv_heads + 1, dtype=np.int32) * (self.heads // self.kv_heads)
        q, sequences, where, starts = map(device.upload, (q, sequences, where, starts))
        count, status = (device.upload(np.array([value], np.int32)) for value in (rows, 0))
        blocks = most_blocks(self.positions, 0)
        at_a_time = max(1, _SCRATCH_BYTES // (4 * self.heads * blocks * (self.head_dim + 18)))
        scratch = Scratch(device, min(rows, at_a_time), blocks, self.heads, self.head_dim, self.heads // self.kv_heads)
        target = Activation(device, rows, self.heads * self.head_dim, self.head_dim, True)

        def launch(layer: int):
            return lambda: attention(device, q, pages=self.cache.table, sequences=sequences, positions=where, head_starts=starts,
                                     kv_heads=self.kv_heads, head_dim=self.head_dim, window=0, scale=self.head_dim**-0.5,
                                     target=target, rows=count, most=rows, most_positions=self.positions, scratch=scratch,
                                     status=status, longest=tokens, **self.cache.pools(layer))
        recorded = Captured(device, *map(launch, range(len(self.cache.keys))))
        if device.download(status)[0]:
            raise BenchmarkError("attention of random keys and values was out of range")
        return recorded


