"""Small checkpoints with random weights, as Hugging Face folders and as GGUF files."""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 512, 768, 2, 8, 4, 32, 300
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def config(**changes) -> dict:
    """The text of config.json for the sizes above; a change to None removes the key."""
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "hidden_act": "silu",
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def weights(dtype: str = "float32", qkv_bias: bool = False, seed: int = 1) -> dict[str, np.ndarray]:
    """Random tensors under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
              "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
        if qkv_bias:
            sizes = {"q": q, "k": kv, "v": kv}
            shapes |= {f"model.layers.{layer}.self_attn.{part}_proj.bias": (n,) for part, n in sizes.items()}
    return {name: rng.standard_normal(shape, np.float32).astype(TYPES[dtype]) for name, shape in shapes.items()}


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1, **changes) -> Path:
    """A Hugging Face folder of one file or of several shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    shard_of = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: t for name, t in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{suffix}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"


def metadata(architecture: str = "llama") -> dict:
    """The metadata of a GGUF file for the sizes above, keys without the architecture."""
    return {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM, "vocab_size": VOCAB,
    }


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", types: dict | None = None,
               values: dict | None = None, changes: dict | None = None, split: tuple | None = None) -> Path:
    """A GGUF file with these GGUF-named tensors as they are.

    ``types`` names the type of tensors that are given as raw blocks (uint8), ``values`` are whole metadata keys,
    ``changes`` keys after the architecture; None removes one. ``split`` is (number, count) of a part.
    """
    writer = gguf.GGUFWriter(path, architecture)
    table = metadata() | (changes or {})
    table = {f"{architecture}.{key}": value for key, value in table.items()} | (values or {})
    for key, value in ({} if split and split[0] else table).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for name, tensor in tensors.items():
        if tensor.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(dtype: str = "float32", qkv_bias: bool = False) -> dict[str, np.ndarray]:
    """Random tensors under their GGUF names; vectors are float32 as llama.cpp's converter writes them."""
    tensors = weights(dtype, qkv_bias)
    return {gguf_name(n): t.astype(np.float32) if t.ndim == 1 else t for n, t in tensors.items()}
