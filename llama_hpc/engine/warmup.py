"""Compiles every kernel that a command needs, on a model of a few weights."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu import joining
from llama_hpc.kernels.cpu.sampling import weigh
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.sizes import whole
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.runtime.abort import agreed
from llama_hpc.weights.loader import load_stage, quantize_tensor
from llama_hpc.weights.places import HostPlaces

_LOOK = 0.002                   # seconds between looks at whether the others are ready


class _TinyCheckpoint:
    """Stands in for a checkpoint: every weight the same."""

    path = "warm-up"
    config = ModelConfig("llama", hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, kv_heads=1, head_dim=16,
                         vocab_size=32, context_length=32, tie_embeddings=True)

    def shape(self, name: str) -> tuple[int, int]:
        return {"k": (16, 32), "v": (16, 32)}.get(name.rsplit(".", 1)[-1], (32, 32))

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        if name.endswith("norm"):
            return np.full(32, 0.5, np.float32)
        height, width = self.shape(name)
        return np.full((len(range(height)[rows or slice(None)]), len(range(width)[columns or slice(None)])), 0.25, np.float32)


def warm_up(weights_format: str, pool: Pool, solo, kv_cache: str | None = None, context: bool = False) -> None:
    """Compiles, or loads from the disk cache, what a run needs for a weight format and a format of the KV cache.

    ``solo`` is a communicator of one rank; ``kv_cache`` as in TransformerStage; ``context``: with context parallelism.
    """
    checkpoint, reducer = _TinyCheckpoint(), TensorReducer(solo)
    stage, share = whole(checkpoint.config)
    weights = load_stage(checkpoint, weights_format, stage, share, reducer, solo, threads=pool.threads,
                         places=HostPlaces(pool))
    sizes = {"sequences": 1, "max_seq_len": 16, "max_rows": 9, "max_outputs": 1}
    if context:
        # One of two ranks: what it finds is not what the model says, but every kernel has run.
        half = replace(share, context=2)
        TransformerStage(checkpoint.config, stage, half, weights, reducer, pool, kv_cache=kv_cache, context=reducer, **sizes
                         ).forward(_batch())
    model = TransformerStage(checkpoint.config, stage, share, weights, reducer, pool, kv_cache=kv_cache, **sizes)
    # One rank alone never sums over a tensor group.
    _ = joining.join_operation.address, joining.meet_operation.address
    model.forward(_batch())
    weigh(model.logits[0], np.empty(model.logits.shape[1], np.int64))


def _batch() -> Batch:
    ids = np.arange(9, dtype=np.int32)
    return Batch(9, ids, np.zeros(9, np.int32), ids, np.array([8]))


def warm_up_quantizing(weights_format: str, threads: int) -> None:
    """As ``warm_up``, for what quantising alone needs."""
    for name in ("embedding", "layers.0.q"):
        quantize_tensor(_TinyCheckpoint(), name, weights_format, threads=threads)


def once_per_node(node: MPI.Comm, compile_all: Callable[[], None]) -> None:
    """One rank of ``node``, the ranks of a node, compiles into the disk cache while the others wait; then all load from there.

    Collective over ``node``.
    """
    for turn in (True, False):
        if (node.rank == 0) == turn:
            with agreed(MPI.COMM_SELF, "compiling the kernels"):
                compile_all()
        # Who waits leaves its core to who compiles, for minutes at times.
        everybody = node.Ibarrier()
        while not everybody.Test():
            time.sleep(_LOOK)
