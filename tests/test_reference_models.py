"""The checkpoints of reference_models.py are rebuilt exactly, and the stored reference values are usable."""

import json

import numpy as np
import pytest
import reference_gguf as gguf_models
import reference_models as models
from gguf import GGUFReader, dequantize
from safetensors import safe_open


@pytest.mark.parametrize("name", models.CASES)
def test_checkpoint_is_rebuilt_bit_for_bit(name, tmp_path):
    folder = models.write_checkpoint(name, tmp_path / name)
    assert models.folder_hash(folder) == models.reference(name).sha256


@pytest.mark.parametrize("name", [*models.CASES, *models.STORIES])
def test_reference_is_consistent_and_not_a_matter_of_luck(name):
    stored = models.reference(name)
    vocab = stored.config["vocab_size"]
    assert stored.logits.shape == (len(stored.logits_positions), vocab)
    assert stored.logits.dtype == np.float32
    assert stored.greedy_ids.shape == stored.margins.shape == (64,)
    assert stored.greedy_ids[0] == stored.logits[-1].argmax()
    assert stored.margins.min() > 2e-3
    assert len(set(stored.greedy_ids.tolist())) >= 20
    assert stored.prompt_ids.min() >= 0 and stored.prompt_ids.max() < vocab
    assert stored.inverse_frequencies.shape == (stored.config["head_dim"] // 2,)
    if name in models.CASES:
        assert np.array_equal(stored.prompt_ids, models.prompt(name))


def test_every_feature_has_a_case():
    configs = [models.reference(name).config for name in models.CASES]
    assert {config["model_type"] for config in configs} == {"llama", "mistral", "qwen2", "qwen3"}
    kinds = {config["rope_parameters"]["rope_type"] for config in configs}
    assert kinds == {"default", "linear", "dynamic", "yarn", "llama3"}
    assert {models.case(name).dtype for name in models.CASES} == {"float32", "float16", "bfloat16"}
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    windowed = [models.reference(name) for name in models.CASES if any(models.reference(name).config["windows"])]
    assert len(windowed) == 3
    assert all(max(stored.config["windows"]) < len(stored.prompt_ids) for stored in windowed)


def test_safetensors_reads_the_sharded_files(tmp_path):
    folder = models.write_checkpoint("llama_odd", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    expected = models.weights("llama_odd")
    assert set(index["weight_map"]) == set(expected)
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "numpy") as tensors:
            assert np.array_equal(tensors.get_tensor(name), expected[name])


def test_random_llama_has_the_stated_shapes_in_several_files(tmp_path):
    models.write_random_llama(tmp_path, 64, 172, 2, 8, 4, 1000, dtype="float16", shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {}
    for file in files:
        with safe_open(file, "numpy") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: value.shape for name, value in found.items()} == models.tensor_shapes(config)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    embedding = found["model.embed_tokens.weight"].astype(np.float32)
    assert abs(embedding.std() - 1 / 8) < 0.01
    assert len(np.unique(embedding, axis=0)) == 1000


@pytest.mark.parametrize("name", gguf_models.GGUF_CASES)
def test_gguf_holds_the_same_values_in_llama_cpp_order(name, tmp_path):
    config = models.case(name).config
    head_dim = models.reference(name).config["head_dim"]
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf_models.write_gguf(name, tmp_path / "m.gguf")).tensors}
    expected = {gguf_models.gguf_name(key): value for key, value in models.weights(name).items()}
    assert set(stored) - {"rope_freqs.weight"} == set(expected)
    # The error of rounding to the stored type.
    tolerance = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[models.case(name).dtype]
    for key, value in expected.items():
        found = dequantize(stored[key].data, stored[key].tensor_type)
        if config["model_type"] == "llama" and key.split(".")[-2] in ("attn_q", "attn_k"):
            heads = found.reshape(-1, head_dim, *found.shape[1:])
            found = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(found.shape)
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=1e-6 if tolerance else 0)


def test_gguf_rope_factors_are_those_of_transformers():
    stored = models.reference("llama_llama3")
    plain = 500000.0 ** (-np.arange(0, 24, 2) / 24)
    factors = gguf_models.llama3_factors(models.case("llama_llama3").config, 24)
    assert len(np.unique(factors)) > 2
    np.testing.assert_allclose(plain / factors, stored.inverse_frequencies, rtol=1e-6)
