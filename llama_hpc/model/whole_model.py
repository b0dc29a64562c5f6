"""A whole model on one device, for one process on its own: without MPI, Numba and HDF5."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from llama_hpc.kernels.formats import PLAIN_BYTES, table_format
from llama_hpc.kernels.numerics import BLOCK, down_block
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.device_cache import DTYPES, DeviceCache
from llama_hpc.model.device_stage import DeviceStage
from llama_hpc.model.shares import StageShare, TensorShare


class Alone:
    """Stands in for what joins over a tensor group (see ``comm.reduce``) where the group is one rank."""

    size, comm = 1, None
    nanoseconds = np.zeros(1, np.int64)

    def work(self) -> dict:
        return {}

    def free(self) -> None:
        pass


def assemble(config: ModelConfig, weights_format: str, matrix: Callable, vector: Callable) -> SimpleNamespace:
    """All weights of a model, with the names of ``transformer.StageWeights``.

    ``matrix(name, block, format)``: weights of that name (see ``weights.layout``), k per reduction block and format, as products
    take them; ``vector(name)``: float32 norms and biases.
    """
    def linear(name: str, block: int = BLOCK, kind: str = weights_format, biased: bool = False) -> SimpleNamespace:
        return SimpleNamespace(weights=matrix(name, block, kind),
                               bias=vector(name + "_bias") if biased else np.zeros(0, np.float32))

    def layer(prefix: str) -> SimpleNamespace:
        q, k, v = (linear(prefix + name, biased=config.attention_bias) for name in "qkv")
        o = linear(prefix + "o", min(config.head_dim, BLOCK), biased=config.output_bias)
        norms = [vector(prefix + name) if config.qk_norm else None for name in ("q_norm", "k_norm")]
        gate, up = (linear(prefix + name, biased=config.mlp_bias) for name in ("gate", "up"))
        down = linear(prefix + "down", down_block(config.intermediate_size), biased=config.mlp_bias)
        return SimpleNamespace(attention_norm=vector(prefix + "attention_norm"), mlp_norm=vector(prefix + "mlp_norm"),
                               attention=SimpleNamespace(q=q, k=k, v=v, o=o, q_norm=norms[0], k_norm=norms[1]),
                               mlp=SimpleNamespace(gate=gate, up=up, down=down))

    embedding = linear("embedding", kind=table_format(weights_format, "embedding"))
    head = embedding if config.tie_embeddings else linear("head", kind=table_format(weights_format, "head"))
    return SimpleNamespace(quantized=weights_format not in PLAIN_BYTES, embedding=embedding, head=head,
                           kv_cache="f32" if weights_format == "f32" else "f16", final_norm=vector("final_norm"),
                           layers=[layer(f"layers.{number}.") for number in range(config.num_layers)])


def whole_stage(config: ModelConfig, weights, device, *, sequences: int, max_seq_len: int, max_rows: int,
                kv_cache: str | None = None) -> DeviceStage:
    """The stage that has all layers, with a final page table. ``kv_cache``: None for the format that suits the weights."""
    stage, share = StageShare(range(config.num_layers), True, True), TensorShare.of(config, 1, 0)
    cache = DeviceCache(device, stage.layers, config.kv_heads, config.head_dim, sequences, max_seq_len,
                        DTYPES[kv_cache or weights.kv_cache])
    return DeviceStage(config, stage, share, weights, Alone(), device, sequences=sequences, max_seq_len=max_seq_len,
                       max_rows=max_rows, max_outputs=sequences, cache=cache)
