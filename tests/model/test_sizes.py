"""Sizes that are computed without reading a weight, against the real thing."""

import json
from math import prod

import numpy as np
import pytest
from local_ranks import LocalReducer, on_ranks
from model_shapes import SHAPES
from mpi4py import MPI
from reference_models import CASES, case, tensor_shapes, write_checkpoint

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.codebook import fit_codebook
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.attention import scratch_bytes
from llama_hpc.kernels.cpu.quantize import quantize_q3_5, quantize_q4, quantize_q8, row_maxima
from llama_hpc.kernels.formats import Blocks, table_format
from llama_hpc.kernels.numerics import down_block
from llama_hpc.model.kv_cache import KVCache
from llama_hpc.model.shares import StageShare, TensorShare, stage_shares
from llama_hpc.model.sizes import buffer_bytes, cache_bytes, packed_bits, parameters, weight_bytes, whole
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.hf_config import read_hf_config
from llama_hpc.weights.loader import load_stage

FORMATS = ("f32", "f16", "q8", "q4", "q3_5")
# Tied with FFN 192 and 9 heads; untied with FFN 172 and vocabulary 515.
TINY = ("smollm", "llama_odd")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: open_checkpoint(write_checkpoint(name, folder / name)) for name in TINY}


def matrix_bytes(weights):
    """Bytes of a rank's matrices: all that it holds but norms and biases."""
    vectors = [weights.final_norm]
    for layer in weights.layers:
        a, m = layer.attention, layer.mlp
        vectors += [layer.attention_norm, layer.mlp_norm, a.q_norm, a.k_norm]
        vectors += [linear.bias for linear in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down)]
    return weights.nbytes - sum(v.nbytes for v in vectors if v is not None)


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", TINY)
def test_weight_bytes_are_those_of_the_loaded_arrays(checkpoint, name, stages, ranks, weights_format):
    model = checkpoint[name]
    for stage in stage_shares(model.config, stages):
        def sizes(comm, stage=stage):
            share = TensorShare.of(model.config, ranks, comm.rank)
            weights = load_stage(model, weights_format, stage, share, LocalReducer(comm), comm)
            return matrix_bytes(weights), weight_bytes(model.config, weights_format, stage, share)
        for real, computed in on_ranks(ranks, sizes):
            assert real == computed


@pytest.mark.parametrize("weights_format", ["q8", "q4", "q3_5"])
@pytest.mark.parametrize("name", TINY)
def test_packed_bits_are_those_of_the_packed_bytes(checkpoint, name, weights_format):
    model = checkpoint[name]
    blocks = {"o": min(model.config.head_dim, 256), "down": down_block(model.config.intermediate_size)}
    packed, values = {"layers": 0, "tables": 0}, {"layers": 0, "tables": 0}
    for tensor in model.names():
        shape = model.shape(tensor)
        if len(shape) == 1:
            continue
        kind = "layers" if tensor.startswith("layers") else "tables"
        cut = Blocks(shape[1], blocks.get(tensor.rsplit(".")[-1], 256))
        w = model.read(tensor)
        coded = table_format(weights_format, tensor) if kind == "tables" else weights_format
        if coded == "q8":
            result = quantize_q8(w, cut)
        elif coded == "q4":
            result = quantize_q4(w, cut)
        else:
            result = quantize_q3_5(w, cut, fit_codebook(w, cut), row_maxima(w))
        packed[kind] += len(result.bytes())
        values[kind] += w.size
    layers, everything = packed_bits(model.config, weights_format)
    assert layers == 8 * packed["layers"] / values["layers"]
    assert everything == 8 * sum(packed.values()) / sum(values.values())


def test_bits_of_real_shapes():
    for config in SHAPES.values():
        assert packed_bits(config, "f32") == (32, 32)
        assert packed_bits(config, "f16") == (16, 16)
    for name in ("TinyLlama-1.1B", "Llama-3-8B", "Llama-3-70B"):
        assert 3.625 < packed_bits(SHAPES[name], "q3_5")[0] <= 3.66
        assert 4.5 <= packed_bits(SHAPES[name], "q4")[0] < 4.51
        assert 4.51 < packed_bits(SHAPES[name], "q4")[1] < 4.8
        assert 8.5 <= packed_bits(SHAPES[name], "q8")[1] < 8.51


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_the_sum_over_all_tensors(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(case(name).config))
    expected = sum(prod(shape) for shape in tensor_shapes(case(name).config).values())
    assert parameters(read_hf_config(tmp_path)) == expected


@pytest.mark.parametrize(("name", "count"), [("SmolLM2-135M", 134_515_008), ("TinyLlama-1.1B", 1_100_048_384),
                                             ("Llama-3-8B", 8_030_261_248), ("Llama-3-70B", 70_553_706_496),
                                             ("Qwen2-0.5B", 494_032_768)])
def test_parameters_of_published_models(name, count):
    assert parameters(SHAPES[name]) == count


@pytest.mark.parametrize(("weights_format", "kv_cache", "dtype"), [
    ("f32", "auto", "float32"), ("f32", "f16", "uint16"), ("f32", "q8", "int8"), ("q3_5", "q8", "int8"),
    *((name, "auto", "uint16") for name in FORMATS[1:])])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_cache_bytes_are_those_of_the_allocated_pools(weights_format, kv_cache, dtype, ranks):
    config = SHAPES["stories260K"]
    for stage in stage_shares(config, 2):
        for index in range(ranks):
            share = TensorShare.of(config, ranks, index)
            cache = KVCache(stage.layers, len(share.kv_heads), config.head_dim, 3, 64, dtype)
            assert cache.nbytes == 3 * 64 * cache_bytes(config, weights_format, stage, share, kv_cache)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("weights_format", ["f32", "q8"])
@pytest.mark.parametrize("name", TINY)
def test_buffer_bytes_are_those_of_the_arrays_that_steps_write(checkpoint, name, weights_format, last, pool):
    model = checkpoint[name]
    config, share = model.config, whole(model.config)[1]
    stage = StageShare(range(config.num_layers), True, last)
    weights = load_stage(model, weights_format, stage, share, TensorReducer(MPI.COMM_SELF), MPI.COMM_SELF)
    made = TransformerStage(config, stage, share, weights, TensorReducer(MPI.COMM_SELF), pool(2), sequences=4, max_seq_len=200,
                            max_rows=300, max_outputs=40)
    found = {}
    for owner in (made, made.buffers):
        for value in vars(owner).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, np.ndarray | Activation):
                    found[id(item)] = item
    held = sum(array.nbytes for array in found.values()) + made.buffers.sums[0].own.nbytes
    # Of a thread's scratch what attention writes.
    held += 2 * scratch_bytes(200, config.head_dim, config.num_heads // config.kv_heads)
    computed = buffer_bytes(config, weights_format, stage, share, rows=300, outputs=40, max_seq_len=200, threads=2, joined=False)
    assert computed == pytest.approx(held, rel=0.03)
