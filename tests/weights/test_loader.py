"""Loading: damaged values are named, and a share is that part of the whole model, whatever the format and the cut."""

import numpy as np
import pytest
from local_ranks import LocalReducer, on_ranks
from reference_models import write_checkpoint

from llama_hpc.errors import CheckpointError
from llama_hpc.kernels.cpu.calls import matmul
from llama_hpc.model.shares import TensorShare, stage_shares
from llama_hpc.model.sizes import whole
from llama_hpc.weights import loader
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.loader import load_stage, loading_steps

FORMATS = ("f32", "q8", "q3_5")
# Every kind of tensor: biases on all projections; norms of q and k heads, tied embeddings; FFN 172, vocabulary 515.
MODELS = ("llama_biases", "qwen3", "llama_odd")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: open_checkpoint(write_checkpoint(name, folder / name)) for name in MODELS}


def load(checkpoint, weights_format, comm, stage=None, **options):
    """The share of rank ``comm.rank`` of ``comm.size`` tensor ranks."""
    config = checkpoint.config
    share = TensorShare.of(config, comm.size, comm.rank)
    return load_stage(checkpoint, weights_format, stage or whole(config)[0], share, LocalReducer(comm), comm, **options)


def load_all(checkpoint, weights_format, ranks=1, **options):
    return on_ranks(ranks, lambda comm: load(checkpoint, weights_format, comm, **options))


class Changed:
    """A checkpoint with one value replaced, which also notes how much is read at a time."""

    def __init__(self, checkpoint, tensor="", place=(), value=0.0):
        self.checkpoint, self.tensor, self.place, self.value, self.largest = checkpoint, tensor, place, value, 0

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def read(self, name, rows=None, columns=None):
        values = self.checkpoint.read(name)
        if name == self.tensor:
            values[self.place] = self.value
        part = values[rows or slice(None)] if columns is None else values[rows or slice(None), columns]
        self.largest = max(self.largest, part.size)
        return np.ascontiguousarray(part)


def kinds(checkpoint):
    """One tensor of every kind: those of layer 1, the tables and the final norm."""
    return [name for name in checkpoint.names() if not name.startswith("layers") or name.startswith("layers.1.")]


@pytest.mark.parametrize("weights_format", ["f32", "q8"])
@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
def test_values_that_are_no_numbers_are_named_with_their_row(checkpoints, name, weights_format):
    checkpoint = checkpoints[name]
    for number, tensor in enumerate(kinds(checkpoint)):
        shape, value = checkpoint.shape(tensor), (np.nan, np.inf, -np.inf)[number % 3]
        row = shape[0] - 2
        damaged = Changed(checkpoint, tensor, (row, *(n // 3 for n in shape[1:])), value)
        with pytest.raises(CheckpointError, match=rf"NaN or infinity in tensor {tensor}, row {row};") as caught:
            load_all(damaged, weights_format)
        assert str(checkpoint.path) in str(caught.value)


@pytest.mark.parametrize("part", ["q", "o", "down"])
def test_damage_of_a_quantised_projection(checkpoints, part):
    """In a row that the codebook is fitted to, and in one that only the rank that holds it reads."""
    checkpoint = checkpoints["llama_odd"]
    for row in (0, 7, 63):
        damaged = Changed(checkpoint, f"layers.0.{part}", (row, 5), np.nan)
        with pytest.raises(CheckpointError, match=rf"tensor layers.0.{part}, row {row};"):
            load_all(damaged, "q3_5")


@pytest.mark.parametrize("weights_format", ["f32", "q8"])
def test_rows_are_those_of_the_whole_tensor(checkpoints, weights_format):
    """Not of the share: the last of three ranks finds the damage."""
    checkpoint = checkpoints["llama_biases"]
    for tensor, row in (("embedding", 299), ("layers.2.q", 47), ("layers.2.gate_bias", 111), ("layers.2.k", 15)):
        damaged = Changed(checkpoint, tensor, row, np.nan)
        with pytest.raises(CheckpointError, match=f"tensor {tensor}, row {row};"):
            load_all(damaged, weights_format, 3)


@pytest.mark.parametrize("tensor", ["layers.1.q", "layers.1.down", "embedding"])
@pytest.mark.parametrize("weights_format", ["q8", "q3_5"])
def test_weights_too_large_for_a_quantised_format_are_named_too(checkpoints, weights_format, tensor):
    """An exponent with a flipped bit; float32 weights hold it, and the model then says where it leaves the range."""
    damaged = Changed(checkpoints["llama_odd"], tensor, (17, 3), 1e30)
    with pytest.raises(CheckpointError, match=rf"1e\+30 in tensor {tensor}, row 17.*{weights_format}"):
        load_all(damaged, weights_format)
    load_all(damaged, "f32")


def matrix(linear, columns):
    """float32 [columns + 1, rows]: the weights of a projection, and its bias, as products with it show them.

    A token of 127 at one k and 0 elsewhere has the quantised value 127 and scale 1, so 127 w comes out.
    """
    tokens = np.vstack([np.eye(columns, dtype=np.float32) * 127, np.zeros((1, columns), np.float32)])
    out = matmul(tokens, linear.weights)
    return out + linear.bias if linear.bias.size else out


def contents(weights, config, share):
    """All that a rank holds, by logical name: matrices as ``matrix`` gives them, vectors as they are."""
    head_dim, ffn = config.head_dim, len(share.ffn)
    inputs = {"o": len(share.query_heads) * head_dim, "down": ffn}
    def show(name, linear):
        return matrix(linear, inputs.get(name, config.hidden_size))
    held = {"embedding": show("embedding", weights.embedding), "head": show("head", weights.head),
            "final_norm": weights.final_norm}
    for i, layer in enumerate(weights.layers):
        for part in ("q", "k", "v", "o"):
            held[f"{i}.{part}"] = show(part, getattr(layer.attention, part))
        for part in ("gate", "up", "down"):
            held[f"{i}.{part}"] = show(part, getattr(layer.mlp, part))
        held |= {f"{i}.attention_norm": layer.attention_norm, f"{i}.mlp_norm": layer.mlp_norm,
                 f"{i}.q_norm": layer.attention.q_norm, f"{i}.k_norm": layer.attention.k_norm}
    return held


def cut(name, values, config, share):
    """The part of the whole model's contents that a share should hold."""
    def heads(held):
        return slice(held.start * config.head_dim, held.stop * config.head_dim)
    part = name.rsplit(".")[-1]
    if values is None or values.ndim == 1:
        return values
    if part in ("o", "down"):
        rows = heads(share.query_heads) if part == "o" else slice(share.ffn.start, share.ffn.stop)
        return np.vstack([values[:-1][rows], values[-1:]])
    columns = {"q": heads(share.query_heads), "k": heads(share.kv_heads), "v": heads(share.kv_heads),
               "gate": slice(share.ffn.start, share.ffn.stop), "up": slice(share.ffn.start, share.ffn.stop)}
    return values[:, columns.get(part, slice(share.vocabulary.start, share.vocabulary.stop))]


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize(("name", "ranks"), [("llama_biases", 2), ("llama_biases", 5), ("qwen3", 3), ("llama_odd", 8)])
def test_a_share_is_that_part_of_the_whole(checkpoints, name, ranks, weights_format):
    checkpoint = checkpoints[name]
    config = checkpoint.config
    everything = contents(load_all(checkpoint, weights_format)[0], config, whole(config)[1])
    for index, weights in enumerate(load_all(checkpoint, weights_format, ranks)):
        share = TensorShare.of(config, ranks, index)
        for tensor, found in contents(weights, config, share).items():
            expected = cut(tensor, everything[tensor], config, share)
            assert (found is None) == (expected is None)
            np.testing.assert_array_equal(found, expected, err_msg=tensor)


@pytest.mark.parametrize(("weights_format", "error"), [("f32", 1e-13), ("q8", 5e-5), ("q3_5", 0.02)])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_checkpoint(checkpoints, name, weights_format, error):
    """Within the relative squared error of a format."""
    checkpoint = checkpoints[name]
    found = contents(load_all(checkpoint, weights_format)[0], checkpoint.config, whole(checkpoint.config)[1])
    for tensor in checkpoint.names():
        expected = checkpoint.read(tensor)
        if tensor.endswith("_bias"):
            shown = found[tensor.removeprefix("layers.").removesuffix("_bias")][-1]
            np.testing.assert_allclose(shown, expected, atol=2**-32)
        elif expected.ndim == 1:
            np.testing.assert_array_equal(found[tensor.removeprefix("layers.")], expected)
        else:
            values = found[tensor.removeprefix("layers.")].astype(np.float64)
            shown = (values[:-1] - values[-1]).T / 127
            # Of a model in q3_5 the embedding is in q8, a head of its own in q4.
            allowed = {"embedding": 5e-5, "head": 0.009}.get(tensor, error) if weights_format == "q3_5" else error
            assert ((shown - expected) ** 2).sum() <= allowed * (expected.astype(np.float64) ** 2).sum(), tensor


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_hashes_do_not_depend_on_the_cut(checkpoints, name, weights_format):
    checkpoint = checkpoints[name]
    def hashes(comm):
        own = {}
        load(checkpoint, weights_format, comm, hashes=own)
        return own
    (expected,) = on_ranks(1, hashes)
    assert set(expected) == {n for n in checkpoint.names() if len(checkpoint.shape(n)) == 2}
    assert len(set(expected.values())) == len(expected)
    for ranks in (3, checkpoint.config.num_heads):
        first, *others = on_ranks(ranks, hashes)
        assert first == expected and not any(others)


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", ["qwen3", "llama_odd"])
def test_progress_reaches_its_end(checkpoints, name, stages, ranks, weights_format):
    checkpoint = checkpoints[name]
    for stage in stage_shares(checkpoint.config, stages):
        def steps(comm, stage=stage):
            calls = []
            load(checkpoint, weights_format, comm, stage, progress=lambda: calls.append(1))
            return len(calls), loading_steps(checkpoint.config, weights_format, stage, comm)
        for made, announced in on_ranks(ranks, steps):
            assert made == announced > 0


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_tensor_is_read_in_chunks(checkpoints, monkeypatch, weights_format, ranks):
    """So memory beyond the weights stays small; and the chunks leave no trace in the result."""
    config = checkpoints["llama_odd"].config
    expected = [contents(w, config, TensorShare.of(config, ranks, i))
                for i, w in enumerate(load_all(checkpoints["llama_odd"], weights_format, ranks))]
    chunk = 1000
    assert chunk < 172 * 64
    monkeypatch.setattr(loader, "CHUNK", chunk)
    watched = Changed(checkpoints["llama_odd"])
    for index, weights in enumerate(load_all(watched, weights_format, ranks)):
        for tensor, found in contents(weights, config, TensorShare.of(config, ranks, index)).items():
            np.testing.assert_array_equal(found, expected[index][tensor], err_msg=tensor)
    assert 0 < watched.largest <= chunk
