"""Layers dealt out by measured speed, where the stages of a pipeline compute on unlike devices.

Where all are alike, nothing is measured. How layers are dealt out changes no bit of any answer.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.engine.layout import Cut, layers_that_fit
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.kernels.numerics import PAGE, down_block
from llama_hpc.model.kv_cache import DTYPES
from llama_hpc.model.random_weights import random_stage
from llama_hpc.model.shares import StageShare, TensorShare, stage_shares
from llama_hpc.model.sizes import weight_bytes
from llama_hpc.model.transformer import Batch, StageWeights, TransformerStage
from llama_hpc.runtime.abort import agreed
from llama_hpc.runtime.devices import told

if TYPE_CHECKING:
    from llama_hpc.engine.model_job import ModelJob

_LOG = logging.getLogger(__name__)
_ROWS = 16                      # of a step that is timed: so many sequences, one token each
_BYTES = 256 << 20              # of weights that it reads, more than caches hold; at least those of a layer
_LEAST = 0.003                  # seconds that it takes: beside it, its start and its end are short …
_PASSES = 64                    # … for which it may go through the weights so many times
_WARM, _ROUNDS = 2, 5           # steps before those that are timed, of which the quickest counts


@dataclass(frozen=True)
class Pace:
    """What one rank finds: seconds for its share of a layer on its ``device``, and bytes that it may use."""

    stage: int
    device: str
    seconds: float
    memory: int


def cut_layers(job: "ModelJob", sizes: Sequence[int], reserved: int) -> Cut:
    """How the stages of the job's grid share the layers: by their speed too where their devices differ, and they have the memory.

    ``sizes`` and ``reserved`` as for ``ModelJob.choose_shape``. Measuring needs the devices, so the job compiles then. Collective
    over the job.
    """
    config, shape = job.checkpoint.config, job.grid.shape
    even = Cut.even(config, shape.pipeline, job.memory, job.outputs)
    own = job.grid.stage, job.device.name or "CPU"
    if shape.pipeline == 1 or not unlike(job.comm.allgather(own)):
        return even
    memory = job.own_memory() - reserved
    job.compile()
    job.comm.Barrier()          # ranks of a node measure at the same time, as they will compute at the same time
    with agreed(job.comm, "measuring the devices"), told():
        seconds = layer_seconds(job)
    paces = job.comm.allgather(Pace(*own, seconds, memory))
    ranks = [[pace for pace in paces if pace.stage == stage] for stage in range(shape.pipeline)]
    slowest = [max(group, key=lambda pace: pace.seconds) for group in ranks]
    memories = [min(pace.memory for pace in group) for group in ranks]
    how, cut = "evenly, as memory has no room for another cut", even
    for positions in _positions(sizes, shape.data):
        most = layers_that_fit(config, job.weights, shape, memories, positions, job.kv_cache, job.settings.context_parallel)
        if min(most) > 0 and sum(most) >= config.num_layers:
            stages = stage_shares(config, shape.pipeline, [pace.seconds for pace in slowest], most, job.outputs)
            how, cut = "by measured speed", Cut(stages, memories)
            break
    if job.first:
        _LOG.info("layers %s: %s", how, "; ".join(
            f"stage {pace.stage} ({pace.device}) {1e3 * pace.seconds:.3g} ms a layer: {len(stage.layers)}"
            for pace, stage in zip(slowest, cut.stages, strict=True)))
    return cut


def unlike(found: Sequence[tuple[int, str]]) -> bool:
    """Whether stages compute on other devices than each other, of (stage, device) of all ranks: the slowest of each counts."""
    devices: dict[int, set[str]] = {}
    for stage, device in found:
        devices.setdefault(stage, set()).add(device)
    return any(devices[stage] != devices[0] for stage in devices)


def _positions(sizes: Sequence[int], replicas: int) -> tuple[int, int]:
    """Positions that a cache should have room for, and those that it must: as ``auto_grid``, and as ``check_room`` have it."""
    answers, at_once, longest, *usual = sizes
    return max(longest, min(at_once, -(-answers // replicas)) * (usual[0] if usual else longest)), longest


def layer_seconds(job: "ModelJob") -> float:
    """How long this rank's device takes for its share of one layer in a step of decoding, without any exchange. Not collective.

    The weights are made up, as many layers of them as exceed caches and the stage may have.
    """
    config, share, one = job.checkpoint.config, job.share, StageShare(range(1), False, False)
    if not share.ffn:
        # A rank without any waits for the others of its group, which have a block at least.
        share = replace(share, ffn=range(down_block(config.intermediate_size)))
    count = min(-(-_BYTES // weight_bytes(config, job.weights, one, share)), -(-config.num_layers // job.grid.shape.pipeline))
    if job.gpu is None:
        random = RandomWeights(job.pool)
    else:
        from llama_hpc.kernels.cuda.random_weights import RandomDeviceWeights
        random = RandomDeviceWeights(job.gpu)
    weights = random_stage(config, job.weights, StageShare(range(count), False, False), share, random)
    seconds, passes = _step_seconds(job, share, weights), 1
    if seconds < _LEAST:
        passes = min(_PASSES, int(_LEAST / seconds) + 1)
        seconds = _step_seconds(job, share, replace(weights, layers=weights.layers * passes))
    return seconds / (count * passes)


def _step_seconds(job: "ModelJob", share: TensorShare, weights: StageWeights) -> float:
    """The quickest step through all these layers."""
    # At position 0 no window matters, and there may be more layers than the model has.
    config, stage = replace(job.checkpoint.config, windows=()), StageShare(range(len(weights.layers)), False, False)
    whose = config, stage, share, weights, TensorReducer(MPI.COMM_SELF)
    sizes = {"sequences": _ROWS, "max_seq_len": PAGE, "max_rows": _ROWS, "max_outputs": 1}
    if job.gpu is None:
        timed = TransformerStage(*whose, job.pool, kv_cache=job.kv_cache, **sizes)
    else:
        from llama_hpc.model.device_cache import DeviceCache
        from llama_hpc.model.device_stage import DeviceStage
        cache = DeviceCache(job.gpu, stage.layers, len(share.kv_heads), config.head_dim, _ROWS, PAGE, DTYPES[job.kv_cache])
        timed = DeviceStage(*whose, job.gpu, cache=cache, **sizes)
    tokens = np.zeros(_ROWS, np.int32)
    batch = Batch(_ROWS, tokens, np.arange(_ROWS, dtype=np.int32), tokens, np.zeros(0, np.int64))
    found = []
    for _ in range(_WARM + _ROUNDS):
        start = time.perf_counter()
        timed.forward(batch)
        found.append(time.perf_counter() - start)
    timed.free()
    return min(found[_WARM:])
