"""Makes transformers_configs.json: config.json texts and what Hugging Face transformers makes of them.

Needs torch and transformers; run by hand: python tests/weights/make_transformers_configs.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
         "vocab_size": 50}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = [(family, {}) for family in CLASSES] + [
    ("llama", {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "eos_token_id": [3, 4]}),
    ("llama", {"eos_token_id": None, "bos_token_id": None}),
    ("llama", {"max_position_embeddings": 131072, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("llama", {"max_position_embeddings": 65536, "rope_scaling": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "beta_fast": 16.0,
                                     "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
                                     "original_max_position_embeddings": 16384, "attention_factor": 1.25}}),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen2", {"num_key_value_heads": 8, "rope_theta": 1e6, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
]


def describe(given: dict) -> dict:
    config = AutoConfig.for_model(**given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    if config.model_type == "mistral":
        windows = [config.sliding_window] * len(windows)
    tied = set(model.all_tied_weights_keys)
    return {
        "kv_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "rope": config.rope_parameters,
        "windows": windows,
        "tensors": {name: list(t.shape) for name, t in model.state_dict().items() if name not in tied},
        "saved": json.loads(config.to_json_string()),
    }


def main() -> None:
    cases = []
    for family, changes in CASES:
        given = SHAPE | {"model_type": family} | ({"num_key_value_heads": 8} if family == "qwen3" else {}) | changes
        if family == "qwen2" and not changes:
            given["num_attention_heads"] = 32       # its default of 32 KV heads
        expected = describe(json.loads(json.dumps(given)))
        # Folders written by transformers itself must give the same: they hold every key.
        saved = expected.pop("saved") | {"architectures": [CLASSES[family]]}
        given["architectures"] = [CLASSES[family]]
        cases.append({"config": given, "saved": saved, "expected": expected})
    out = Path(__file__).with_name("transformers_configs.json")
    out.write_text(json.dumps({"transformers": transformers.__version__, "cases": cases}, indent=0) + "\n")


main()
