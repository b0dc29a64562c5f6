"""The tensors that a model consists of: their logical names, shapes, and names in each file format.

Matrices are [out, in] as both formats store them. A layer's tensors are ``layers.{i}.{part}``; q and k rows are in
the half-split order of Hugging Face, in which row j of a head turns with row j + head_dim / 2.
"""

from ..model.config import ModelConfig

# A bound against damaged files: the deepest models have a few hundred.
MAX_LAYERS = 10_000

# part -> (name in a Hugging Face folder, name in a GGUF file), after "model.layers.{i}." and "blk.{i}."
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "o_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "gate_bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "up_bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "down_bias": ("mlp.down_proj.bias", "ffn_down.bias"),
}

MODEL_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of every tensor of a model, in the fixed order embedding, layers, final_norm, head."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.hidden_size)}
    parts = _layer_shapes(config)
    for layer in range(config.num_layers):
        shapes.update((f"layers.{layer}.{part}", shape) for part, shape in parts.items())
    shapes["final_norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,), "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
        "mlp_norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }
    if config.attention_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.output_bias:
        shapes["o_bias"] = (hidden,)
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.mlp_bias:
        shapes |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,)}
    return {part: shapes[part] for part in LAYER_NAMES if part in shapes}


def hf_name(name: str) -> str:
    """The name of a logical tensor in a Hugging Face folder."""
    return _file_name(name, 0, "model.layers")


def gguf_name(name: str) -> str:
    """The name of a logical tensor in a GGUF file."""
    return _file_name(name, 1, "blk")


def _file_name(name: str, column: int, layers: str) -> str:
    if name in MODEL_NAMES:
        return MODEL_NAMES[name][column]
    _, layer, part = name.split(".")
    return f"{layers}.{layer}.{LAYER_NAMES[part][column]}"
