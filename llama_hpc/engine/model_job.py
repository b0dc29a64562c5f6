"""What every job with a model does around its own work: the grid, the kernels, the weights, the counters, the facts."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from llama_hpc.comm.choose import tensor_reducer
from llama_hpc.comm.counter import SharedCounters
from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.comm.survivors import failed
from llama_hpc.engine.layout import Cut, auto_grid, check_room, replica_pages
from llama_hpc.engine.queue import COUNTERS, ENDED, TOKENS
from llama_hpc.engine.speed import cut_layers
from llama_hpc.engine.warmup import once_per_node, warm_up
from llama_hpc.engine.watch import Watch
from llama_hpc.errors import UsageError
from llama_hpc.grid import Grid, GridShape
from llama_hpc.kernels.cpu.places import cpu_text
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.kernels.cpu.waiting import Alarm
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.model.context import shared_bytes
from llama_hpc.model.kv_cache import DTYPES, KVCache, cache_format
from llama_hpc.model.shares import TensorShare, check_grid
from llama_hpc.model.sizes import packed_bits, parameters
from llama_hpc.model.transformer import StageWeights, TransformerStage, make_cache
from llama_hpc.runtime.abort import agreed
from llama_hpc.runtime.binding import launch_table, launch_warnings, own_place
from llama_hpc.runtime.devices import CPU, Choice, memory_of, open_device, told
from llama_hpc.runtime.gpus import GpuMonitor
from llama_hpc.runtime.heartbeat import Heartbeat
from llama_hpc.runtime.launch import fault_tolerant
from llama_hpc.runtime.progress import Progress
from llama_hpc.runtime.provenance import collect
from llama_hpc.runtime.start import take_devices
from llama_hpc.runtime.topology import hostname, node_cores, thread_places
from llama_hpc.weights.checkpoint import Checkpoint, open_checkpoint, weights_format
from llama_hpc.weights.fingerprint import fingerprint
from llama_hpc.weights.loader import PeerFailed, load_stage, loading_steps
from llama_hpc.weights.places import DevicePlaces, HostPlaces
from llama_hpc.weights.store import Store

if TYPE_CHECKING:
    from llama_hpc.model.device_cache import DeviceCache
    from llama_hpc.model.device_stage import DeviceStage

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is laid out: ``weights`` is a format or None for the default, ``threads`` those of each rank,
    ``shape`` the grid or None for the one that suits, ``reduce`` how tensor ranks add up (see ``comm.choose``),
    ``sequence_parallel`` from how many tokens of a step on they also deal out rows, ``overlap`` from how many they compute one
    half while sums of the other travel between nodes (0: never), ``kv_cache`` the cache's format (see ``model.kv_cache``);
    ``show``: whether the first rank tells how far long steps have come; ``context_parallel``: so many tensor ranks deal out the
    positions of the cache; ``heartbeat``: seconds between lines that tell that the job is alive (0: none); ``device``: what ranks
    compute on, auto, cpu or gpu (see ``runtime.devices``)."""

    model: str
    weights: str | None
    threads: int
    shape: GridShape | None
    reduce: str = "auto"
    sequence_parallel: int = 2048
    overlap: int = 32
    kv_cache: str = "auto"
    show: bool = True
    context_parallel: int = 1
    heartbeat: float = 0.0
    device: str = "auto"


class ModelJob:
    """A job on ``comm``, usually the world; ``node`` holds its ranks on this node. Methods are collective over it unless they say
    otherwise.

    They are called in the order in which they stand here. ``facts``, on the first rank, become the provenance of the output.
    ``outputs``: the share of tokens whose logits are needed, as far as it is known.
    """

    outputs = 0.5

    def __init__(self, settings: ModelSettings, comm: MPI.Comm, node: MPI.Comm):
        self.settings, self.comm, self.node, self.threads = settings, comm, node, settings.threads
        self.first = comm.rank == 0
        self.show = self.first and settings.show
        self.facts: dict[str, Any] = collect() if self.first else {}
        self.incidents: Counter[str] = Counter()        # of this rank, see ``engine.incidents``
        self.pool: Pool | None = None
        with agreed(comm, "choosing the places of the threads"):
            self.places = thread_places(self.threads)
            self.binding = own_place(self.threads, self.places)
        self._take(take_devices(comm, node, settings.device))

    def _take(self, devices: Sequence[Choice]) -> None:
        """What this rank computes on, of ``devices`` of the ranks of this node. Not collective."""
        self.device = devices[self.node.rank]
        self.binding = replace(self.binding, device=self.device)
        self.heartbeat, self.monitor = Heartbeat(self.settings.heartbeat, devices), GpuMonitor(self.device)

    def examine(self) -> Checkpoint:
        """The checkpoint, checked as far as it can be without reading weights; its name goes to ``facts``. Not collective."""
        checkpoint = open_checkpoint(self.settings.model)
        weights_format(checkpoint, self.settings.weights)
        self.facts["model"] = {"name": self.settings.model, "path": str(Path(checkpoint.path).resolve())}
        if isinstance(checkpoint, Store):
            self.facts["model"] |= {"source": checkpoint.source, "source_content_hash": checkpoint.source_content_hash}
        return checkpoint

    def open(self) -> None:
        """Opens the model on every rank."""
        with agreed(self.comm, "opening the model"):
            self.checkpoint = open_checkpoint(self.settings.model)
            self.weights = weights_format(self.checkpoint, self.settings.weights)
            self.kv_cache = cache_format(self.settings.kv_cache, self.weights)

    def choose_grid(self, *sizes: int, reserved: int = 0) -> Grid:
        """The grid of the shape that ``choose_shape`` finds, and this rank's part of the model in it."""
        config, shape = self.checkpoint.config, self.choose_shape(*sizes, reserved=reserved)
        self.grid = Grid.create(self.comm, shape)
        context = self.settings.context_parallel
        self.share = TensorShare.of(config, shape.tensor, self.grid.tensor_index, context)
        self.context_comm = self.grid.tensor_comm.Split(self.grid.tensor_index // context, self.grid.tensor_index)
        replica = self.grid.replica
        self.alarm = Alarm(lambda: failed(replica)) if fault_tolerant() else None
        self._settle_device()
        self.cut = cut_layers(self, sizes, reserved)
        self.part = self.cut.stages[self.grid.stage]
        return self.grid

    def _settle_device(self) -> None:
        """The ranks of a tensor group compute on the same kind of device, and on GPUs deal out no positions. Collective."""
        gpu, context = self.device.kind == "gpu", self.settings.context_parallel
        alike = self.grid.tensor_comm.allreduce(gpu, MPI.LAND) == self.grid.tensor_comm.allreduce(gpu, MPI.LOR)
        refused = self.comm.allreduce(gpu and (not alike or context > 1), MPI.LOR)
        if not refused:
            return
        why = (f"--context-parallel {context} is for CPUs" if context > 1 else
               "of tensor ranks that reduce together only some have one; let the tensor dimension divide the GPUs of a node")
        with agreed(self.comm, "choosing the devices"):
            if self.settings.device == "gpu":
                raise UsageError(f"--device gpu: {why}")
        if gpu and (not alike or context > 1):
            self.device = CPU
            self.binding = replace(self.binding, device=CPU)
            self.monitor = GpuMonitor(CPU)
        if self.first:
            _LOG.warning("some ranks that have a GPU compute on the CPU: %s", why)

    def choose_shape(self, *sizes: int, reserved: int = 0) -> GridShape:
        """The shape that was asked for, or else the one that ``auto_grid`` finds for ``sizes``, its last parameters.

        ``reserved``: bytes of a rank's memory that neither weights nor cache may take. Where GPUs have too little memory, and
        nobody insists on them, all ranks go on with the CPU.
        """
        gpus = self.comm.allreduce(self.device.kind == "gpu", MPI.LOR)
        try:
            return self._fitting_shape(sizes, reserved, gpus)
        except UsageError as error:
            if not gpus or self.settings.device == "gpu":
                raise
            self._take([CPU] * self.node.size)
            shape = self._fitting_shape(sizes, reserved, gpus=False)
            if self.first:
                _LOG.warning("all ranks compute on the CPU: %s", error)
            return shape

    def _fitting_shape(self, sizes: tuple[int, ...], reserved: int, gpus: bool) -> GridShape:
        config, context = self.checkpoint.config, self.settings.context_parallel
        ranks, per_node, memory = self.resources()
        self.memory = memory - reserved
        with agreed(self.comm, "choosing the grid"):
            whose, how = "its GPU" if gpus else "", {"kv_cache": self.kv_cache, "context": context}
            self.shape = self.settings.shape or auto_grid(config, self.weights, ranks, per_node, self.memory, *sizes, whose=whose,
                                                          **how)
            check_grid(config, self.shape, context)
            # What a node has may be swapped, and files that are mapped be read again: of a GPU's memory there is no more.
            if gpus and self.settings.shape:
                check_room(config, self.weights, self.shape, per_node, self.memory, sizes[2], whose, **how)
        self.cut = Cut.even(config, self.shape.pipeline, self.memory, self.outputs)
        return self.shape

    def resources(self) -> tuple[int, int, int]:
        """How many ranks there are, how many on each node at least, and the bytes that each may use at least."""
        memory = self.own_memory()
        return self.comm.size, self.comm.allreduce(self.node.size, MPI.MIN), self.comm.allreduce(memory, MPI.MIN)

    def own_memory(self) -> int:
        """Bytes that this rank may use."""
        with agreed(self.comm, "asking for memory"):
            return memory_of(self.device, self.node.size)

    def pages(self, kv_memory: int | None = None) -> tuple[int, int]:
        """Pages of a KV cache all of whose parts are such as the rank of least room can hold, and how many with --kv-cache q8;
        with ``kv_memory`` bytes of each rank, if given. Not collective."""
        whose = self.checkpoint.config, self.weights, self.shape, self.cut, kv_memory
        context = self.settings.context_parallel
        own, in_q8 = (replica_pages(*whose, kind, context) for kind in (self.kv_cache, "q8"))
        return own * context, in_q8 * context

    def announce(self, plan: str) -> None:
        """Tells what the job is about to do, where and how; ``plan`` ends the line about the grid."""
        _LOG.debug("grid %s: replica %d, stage %d, tensor rank %d", self.grid.shape, self.grid.data_index, self.grid.stage,
                   self.grid.tensor_index)
        places = self.comm.gather(self.binding)
        if not self.first:
            return
        hosts = len({place.host for place in places})
        config, weights = self.checkpoint.config, self.weights
        _LOG.info("%s: %s, %.1f M parameters, weights %s (%.2f bits all in)", self.settings.model, config.family,
                  parameters(config) / 1e6, weights, packed_bits(config, weights)[1])
        _LOG.info("grid %s (replicas x stages x tensor ranks): %d ranks on %d host%s, %d thread%s each (%s kernels), %s",
                  self.grid.shape, self.comm.size, hosts, "s" * (hosts > 1), self.threads, "s" * (self.threads > 1), kernels(),
                  plan)
        for line in launch_table(places):
            _LOG.info("%s", line)
        for line in launch_warnings(places, MPI.Get_library_version()):
            _LOG.warning("%s", line)

    def compile(self) -> None:
        """Starts the threads, and compiles the kernels, or loads them from the node's cache; the first time only."""
        if self.pool is not None:
            return
        start = time.monotonic()
        with agreed(self.comm, "starting the threads"):
            self.pool = Pool(self.threads)
        with agreed(self.comm, "opening the GPUs"):
            self.gpu = open_device(self.device) if self.device.kind == "gpu" else None
        once_per_node(self.node, self._make_kernels)
        # Not before: the threads that quantise, now started, would inherit the one place of this thread.
        self.pool.bind(self.places)
        if self.first and time.monotonic() - start > 2:
            _LOG.info("kernels ready after %.1f s", time.monotonic() - start)

    def _make_kernels(self) -> None:
        if self.gpu is not None:
            self.gpu.compile()
        else:
            warm_up(self.weights, self.pool, MPI.COMM_SELF, self.kv_cache, self.settings.context_parallel > 1)

    def load(self, hashes: dict[str, str] | None = None) -> StageWeights:
        """This rank's weights. ``hashes`` receives those of tensors."""
        grid, checkpoint, weights = self.grid, self.checkpoint, None
        steps = loading_steps(checkpoint.config, self.weights, self.part, grid.stage_comm, packed=isinstance(checkpoint, Store))
        with (agreed(self.comm, "loading the weights"), Progress(steps, "tensors", "loading", show=self.show) as progress,
              suppress(PeerFailed), told()):    # The rank that failed says why.
            weights = load_stage(checkpoint, self.weights, self.part, self.share, TensorReducer(grid.tensor_comm),
                                 grid.stage_comm, threads=self.threads, progress=progress.update, hashes=hashes,
                                 places=HostPlaces(self.pool) if self.gpu is None else DevicePlaces(self.gpu))
        self.content_hash = fingerprint(checkpoint, self.comm)
        return weights

    def make_stage(self, weights: StageWeights, **sizes: int) -> "TransformerStage | DeviceStage":
        """This rank's part of the model on its device, made for ``sizes`` (see TransformerStage). ``stage.free`` gives memory
        back."""
        config, rows = self.checkpoint.config, sizes["max_rows"]
        whose, settings = (config, self.part, self.share, weights), self.settings
        # Before anything that ranks make together, in which the others would wait for one that failed.
        with agreed(self.comm, "making the KV cache"), told():
            cache = self._make_cache(whose, sizes["sequences"], sizes["max_seq_len"], sizes.pop("pages", None))
        with agreed(self.comm, "preparing the reductions"), told():
            if self.gpu is not None:
                from llama_hpc.comm.device_exchange import choose_exchange
                reducer = TensorReducer(self.grid.tensor_comm)
                exchange = choose_exchange(self.gpu, reducer, sizes["max_outputs"], config.hidden_size)
            else:
                # Shared windows hold two regions of int64 sums and one of float32 rows.
                reducer = self._reducer(self.grid.tensor_comm, rows * config.hidden_size * (2 * 8 + 4))
                context = self._reducer(self.context_comm, rows * shared_bytes(config.head_dim, self.share))
        with agreed(self.comm, "making the buffers"), told():
            if self.gpu is not None:
                from llama_hpc.model.device_stage import DeviceStage
                return DeviceStage(*whose, reducer, self.gpu, cache=cache, exchange=exchange, **sizes)
            return TransformerStage(*whose, reducer, self.pool, **sizes, spread_from=settings.sequence_parallel,
                                    overlap_from=settings.overlap, cache=cache, context=context)

    def _make_cache(self, whose: tuple, sequences: int, max_seq_len: int, pages: int | None) -> "KVCache | DeviceCache":
        if self.gpu is None:
            return make_cache(*whose, sequences, max_seq_len, pages, self.kv_cache)
        from llama_hpc.model.device_cache import DeviceCache
        config, part, share = whose[:3]
        return DeviceCache(self.gpu, part.layers, len(share.kv_heads), config.head_dim, sequences, max_seq_len,
                           DTYPES[self.kv_cache], pages)

    def _reducer(self, comm: MPI.Comm, window_bytes: int) -> TensorReducer:
        """Joins over the tensor or the context group, in shared memory where --reduce and the places of the ranks allow."""
        return tensor_reducer(comm, self.settings.reduce, self.node.size * self.threads > node_cores(), window_bytes, self.alarm)

    def work(self, total: int, unit: str, label: str, run: Callable[[SharedCounters, float, Any], Any]
             ) -> tuple[Any, float, int]:
        """Runs this rank's part of ``total`` things: ``run(counters, start, tick)``, where ``tick`` is to be called often.

        Returns its result, the seconds that the job took, and what the counter TOKENS came to (first rank; elsewhere 0).
        """
        counters = SharedCounters(self.comm, COUNTERS + self.grid.shape.data)
        self.comm.Barrier()
        start = time.monotonic()
        with Progress(total, unit, label, show=self.show) as progress:
            watch = Watch(counters, progress, self.heartbeat) if self.first else None
            result = run(counters, start, watch)
            if self.grid.is_leader:
                counters.add(ENDED, 1)
            if watch:
                watch.until(self.grid.shape.data)
        self.comm.Barrier()
        seconds = time.monotonic() - start
        tokens = counters.read(TOKENS) if self.first else 0
        counters.free()
        return result, seconds, tokens

    def conclude(self, stage: TransformerStage, seconds: float, work: dict[str, Any], options: Mapping[str, Any],
                 **chosen: Any) -> None:
        """Completes ``facts``: ``work`` is what this rank did, ``options`` what was asked for, ``chosen`` what was found where no
        option said so."""
        ranks = self.comm.gather(self.place(stage) | work | self.monitor.work())
        stage.free()
        if self.first:
            self.complete_facts(ranks, self.grid.shape, self.content_hash, seconds, options, chosen)

    def place(self, stage: TransformerStage) -> dict[str, Any]:
        """Where this rank is, what it holds, and what it has joined. Not collective."""
        return {"host": hostname(), "cpus": cpu_text(self.binding.cpus), "device": self.device.text,
                "data": self.grid.data_index, "stage": self.grid.stage, "tensor": self.grid.tensor_index,
                "layers": len(self.part.layers), "weight_bytes": stage.weights.nbytes, "cache_bytes": stage.cache.nbytes,
                "kernels": kernels(), **stage.work()}

    def complete_facts(self, ranks: list[dict[str, Any]], shape: GridShape, content_hash: str, seconds: float,
                       options: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        """First rank: what is known at the end. ``ranks``: ``place`` and work of each."""
        given = {name: value for name, value in options.items() if name not in ("command", "alone") and value is not None}
        self.facts["model"]["content_hash"] = content_hash
        self.facts |= {
            "weights": self.weights, "kv_cache": self.kv_cache, "ranks": self.comm.size, "threads": self.threads,
            "grid": {"data": shape.data, "pipeline": shape.pipeline, "tensor": shape.tensor},
            "kernels": sorted({rank["kernels"] for rank in ranks}),
            "hosts": sorted({rank["host"] for rank in ranks}), "rank_table": ranks,
            "settings": given | {"weights": self.weights, "kv_cache": self.kv_cache, "threads": self.threads,
                                 "grid": str(shape)} | chosen,
            "end_time": datetime.now(UTC).isoformat(timespec="seconds"), "wall_seconds": seconds,
        }
