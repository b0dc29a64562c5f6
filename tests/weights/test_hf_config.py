"""config.json: the same meaning as in Hugging Face transformers, and a clear refusal of everything else."""

import json
from pathlib import Path

import pytest
from tiny_checkpoints import config

from llama_hpc.errors import CheckpointError
from llama_hpc.weights.hf_config import read_hf_config
from llama_hpc.weights.layout import hf_name, tensor_shapes

CASES = json.loads(Path(__file__).with_name("transformers_configs.json").read_text())["cases"]


def read(folder, values, generation=None):
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_hf_config(folder)


@pytest.mark.parametrize("source", ["config", "saved"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["config"]["model_type"])
def test_meaning_is_that_of_transformers(tmp_path, case, source):
    found, expected = read(tmp_path, case[source]), case["expected"]
    assert {hf_name(name): list(shape) for name, shape in tensor_shapes(found).items()} == expected["tensors"]
    assert found.family == case["config"]["model_type"]
    assert found.kv_heads == expected["kv_heads"]
    assert found.norm_eps == expected["rms_norm_eps"]
    assert [found.window(layer) for layer in range(found.num_layers)] == [w or 0 for w in expected["windows"]]
    assert found.bos_token_id == expected["bos_token_id"]
    eos = expected["eos_token_id"]
    assert found.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("source", ["config", "saved"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["config"]["model_type"])
def test_rope_is_that_of_transformers(tmp_path, case, source):
    found, expected = read(tmp_path, case[source]), case["expected"]["rope"]
    rope, length = found.rope, case["expected"]["max_position_embeddings"]
    assert (rope.kind, rope.theta) == (expected["rope_type"], expected["rope_theta"])
    assert rope.factor == expected.get("factor", 1.0)
    fields = {"llama3": ["low_freq_factor", "high_freq_factor"],
              "yarn": ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"]}
    defaults = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for field in fields.get(rope.kind, []):
        assert getattr(rope, field) == expected.get(field, defaults.get(field)), field
    if rope.kind in fields:
        assert rope.original_context == expected["original_max_position_embeddings"]
    stretched = {"yarn": rope.factor * (rope.original_context or 0), "dynamic": rope.factor * length}
    assert found.context_length == max(length, stretched.get(rope.kind, 0))


def test_yarn_without_factor_takes_the_ratio_of_the_contexts(tmp_path):
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    assert read(tmp_path, config(max_position_embeddings=8192, rope_scaling=scaling)).rope.factor == 8.0


def test_end_tokens_come_from_generation_config_first(tmp_path):
    values = config(eos_token_id=2, bos_token_id=1)
    assert read(tmp_path, values, {"eos_token_id": [7, 9, 7]}).eos_token_ids == (7, 9)
    assert read(tmp_path, values, {"eos_token_id": 5}).eos_token_ids == (5,)
    assert read(tmp_path, values, {"temperature": 1.0}).eos_token_ids == (2,)


def test_model_type_alone_is_enough(tmp_path):
    assert read(tmp_path, config(architectures=None, model_type="qwen2")).family == "qwen2"


REFUSED = [
    ({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}, "NoPE"),
    ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "mixture of experts"),
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
    ({"architectures": None, "model_type": None}, "architectures"),
    ({"model_type": "gemma"}, "gemma"),
    ({"architectures": [{}]}, "architectures"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"num_local_experts": 8}, "mixture of experts"),
    ({"no_rope_layers": [1, 0]}, "NoPE"),
    ({"partial_rotary_factor": 0.5}, "partial rotary"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "above 0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": [4]}, "rope_scaling"),
    ({"final_logit_softcapping": 30.0}, "soft-capping"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"num_attention_heads": [8, 4]}, "num_attention_heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "512"}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"head_dim": None, "num_attention_heads": 7}, "multiple"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"layer_types": ["sliding_attention"] * 2}, "sliding_window"),
    ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[f"{list(c)[-1]}-{m}" for c, m in REFUSED])
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, config(**changes))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe", ""])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(tmp_path, name, text):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        read_hf_config(tmp_path)


def test_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_hf_config(tmp_path)
