"""Some checkpoints of reference_models.py as GGUF files, with the conventions of llama.cpp's converter.

Sources: the GGUF specification (ggml/docs/gguf.md) and conversion/{base,llama,qwen}.py of llama.cpp. The types lose
nothing: matrices keep the case's stored type, vectors become float32, so `reference_models.reference` holds here too.
"""

from math import pi
from pathlib import Path

import gguf
import numpy as np
from reference_models import case, encode, weights

# Cases that GGUF can express: its llama architecture has no windows, and its YaRN no options of transformers' kind.
GGUF_CASES = ("llama_mha_tied", "llama_gqa", "llama_biases", "llama_odd", "llama_linear", "llama_llama3", "smollm",
              "qwen2_tied", "qwen2_yarn", "qwen3")  # fmt: skip

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor: ``blk.3.attn_q.weight``."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k (or a bias) from half-split to interleaved RoPE order: pair (i, i + d/2) becomes (2i, 2i + 1)."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: dict, head_dim: int) -> np.ndarray:
    """Divisors of the inverse frequencies that llama3 scaling amounts to, float32 [head_dim / 2]."""
    scaling = config["rope_scaling"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    wavelengths = 2 * pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _add_config(writer: gguf.GGUFWriter, config: dict, head_dim: int) -> None:
    heads, scaling = config["num_attention_heads"], config.get("rope_scaling", {})
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_tokenizer_model("none")
    # The converter writes head sizes only where config.json names one; otherwise they are hidden / heads.
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] == "llama":
        writer.add_rope_dimension_count(head_dim)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, head_dim))


def write_gguf(name: str, path: str | Path) -> Path:
    """Write one of `GGUF_CASES` as a GGUF file without a vocabulary (``tokenizer.ggml.model`` is ``none``)."""
    this, config = case(name), case(name).config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, config["model_type"])
    _add_config(writer, config, head_dim)
    types = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16,
             "bfloat16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
    for label, values in weights(name).items():
        stored, target = encode(values, this.dtype), gguf_name(label)
        if config["model_type"] == "llama" and target.split(".")[-2] in ("attn_q", "attn_k"):
            stored = interleaved(stored, len(stored) // head_dim)
        if stored.ndim == 2:
            writer.add_tensor(target, stored, raw_dtype=types[this.dtype])
        elif this.dtype == "bfloat16":
            writer.add_tensor(target, (stored.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(target, stored.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
