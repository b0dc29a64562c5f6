"""config.json and generation_config.json of a Hugging Face folder -> ModelConfig.

Defaults of absent keys are those of the configuration classes of Hugging Face transformers 5. What this program does
not compute is refused by name.
"""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.config import ModelConfig, RopeConfig
from .fields import Fields, read_json
from .layout import MAX_LAYERS

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_REASONS = {
    "SmolLM3ForCausalLM": "it has layers without RoPE (NoPE)",
    "smollm3": "it has layers without RoPE (NoPE)",
    "MixtralForCausalLM": "it is a mixture of experts",
    "Qwen2MoeForCausalLM": "it is a mixture of experts",
    "Qwen3MoeForCausalLM": "it is a mixture of experts",
}

# Where the families differ; kv_heads None means as many as query heads, head_dim None hidden_size / num_heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"context": 2048, "kv_heads": None, "head_dim": None, "bos": 1, "eos": (2,)},
    "mistral": {"context": 131072, "kv_heads": 8, "head_dim": None, "bos": 1, "eos": (2,)},
    "qwen2": {"context": 32768, "kv_heads": 32, "head_dim": None, "bos": None, "eos": ()},
    "qwen3": {"context": 32768, "kv_heads": 32, "head_dim": 128, "bos": None, "eos": ()},
}

# Keys of other models' configurations that change the result; 0, false, null and empty mean off.
_REFUSED = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "attn_logit_softcapping": "logit soft-capping",
    "final_logit_softcapping": "logit soft-capping",
    "logits_scaling": "logit scaling",
    "residual_multiplier": "residual scaling",
    "embedding_multiplier": "embedding scaling",
    "attention_multiplier": "attention scaling",
    "attention_chunk_size": "chunked attention",
    "use_mrope": "multimodal RoPE",
    "alibi": "ALiBi positions",
    "quantization_config": "a quantised Hugging Face checkpoint (use float weights or GGUF)",
}

_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
    "high_freq_factor", "finetuned",
}


def unsupported_architecture(where: str, found: str, supported: list[str]) -> CheckpointError:
    """The error for an architecture that is not read, with the reason where one is known."""
    reason = f": {_REASONS[found]}" if found in _REASONS else ""
    known = ", ".join(supported)
    return CheckpointError(f"{where}: architecture {found} is not supported{reason} (supported: {known})")


def read_hf_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder. Raises CheckpointError naming file and key.

    ``tie_embeddings`` is what config.json says; whoever knows the tensors decides. ``context_length`` is
    max_position_embeddings, for yarn and dynamic scaling the length that these stretch it to.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; give a Hugging Face folder or a .gguf file")
    config = Fields(read_json(path), str(path))
    family = _family(config)
    defaults = _DEFAULTS[family]
    _refuse_unsupported(config)

    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    has_kv_key = "num_key_value_heads" in config.values
    kv_heads = config.integer("num_key_value_heads", None if has_kv_key else defaults["kv_heads"]) or heads
    rope, context = _rope(config, config.integer("max_position_embeddings", defaults["context"]))
    biased = family == "qwen2" or (family in ("llama", "qwen3") and config.boolean("attention_bias", False))
    eos, bos = _special_tokens(folder, config, defaults)
    return ModelConfig(
        family=family,
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config, hidden, heads, defaults["head_dim"]),
        vocab_size=config.integer("vocab_size"),
        context_length=context,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        attention_bias=biased,
        output_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and config.boolean("mlp_bias", False),
        qk_norm=family == "qwen3",
        windows=_windows(config, family, layers),
        eos_token_ids=eos,
        bos_token_id=bos,
    )


def _family(config: Fields) -> str:
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    if not isinstance(names, list) or len(names) > 1 or not all(isinstance(name, str) for name in names):
        raise config.error(f"architectures is {names!r}, expected a list of one name")
    name = names[0] if names else next((n for n, family in FAMILIES.items() if family == model_type), model_type)
    if not isinstance(name, str):
        raise config.error("neither architectures nor model_type says what model this is")
    if name not in FAMILIES:
        raise unsupported_architecture(config.where, str(name), list(FAMILIES))
    if model_type is not None and model_type != FAMILIES[name]:
        raise config.error(f"architectures says {name}, model_type says {model_type}")
    return FAMILIES[name]


def _refuse_unsupported(config: Fields) -> None:
    for key, feature in _REFUSED.items():
        if config.get(key):
            raise config.error(f"{key} = {str(config.get(key))[:60]}: {feature} is not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error(f"hidden_act = {config.get('hidden_act')}: only silu is supported")
    no_rope = config.get("no_rope_layers", [])
    if not isinstance(no_rope, list) or not all(no_rope):
        raise config.error("no_rope_layers: layers without RoPE (NoPE) are not supported")


def _head_dim(config: Fields, hidden: int, heads: int, default: int | None) -> int:
    head_dim = config.integer("head_dim", None if "head_dim" in config.values else default)
    if head_dim is None:
        if hidden % heads:
            raise config.error(f"no head_dim, and hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    return head_dim


def _windows(config: Fields, family: str, layers: int) -> tuple[int, ...]:
    types = config.get("layer_types")
    window = 0
    if family == "mistral" or (family != "llama" and config.boolean("use_sliding_window", False)):
        # Absent means 4096, null means none.
        window = config.integer("sliding_window", 0 if "sliding_window" in config.values else 4096, minimum=0)
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise config.error(f"layer_types must be a list of num_hidden_layers = {layers} names")
        unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise config.error(f"layer_types: {unknown[0]} is not supported (full_attention, sliding_attention)")
        slides = [t == "sliding_attention" for t in types]
        if any(slides) and not window:
            raise config.error("layer_types has sliding_attention, but no sliding_window is in use")
        if family == "mistral" and window and not all(slides):
            raise config.error("layer_types mixes kinds of attention, which a Mistral model does not have")
    elif family == "mistral":
        slides = [True] * layers
    else:
        first = config.integer("max_window_layers", 28, minimum=0)
        slides = [layer >= first for layer in range(layers)]
    return tuple(window if slide else 0 for slide in slides) if window and any(slides) else ()


def _rope(config: Fields, context: int) -> tuple[RopeConfig, int]:
    # rope_scaling is the name of transformers 4, rope_parameters (with rope_theta inside) that of 5.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = config.get(key, {})
    if not isinstance(table, dict):
        raise config.error(f"{key} is {table!r}, expected an object")
    unknown = sorted(k for k, v in table.items() if k not in _ROPE_KEYS and v is not None)
    if unknown:
        raise config.error(f"{key}.{unknown[0]} is not supported (known: {', '.join(sorted(_ROPE_KEYS))})")
    rope = Fields(table, config.where, f"{key}.")
    partial = rope.number("partial_rotary_factor", None) or config.number("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise config.error(f"partial_rotary_factor = {partial}: partial rotary embedding is not supported")
    theta = rope.number("rope_theta", None) or config.number("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type", "default")
    if kind == "default":
        return RopeConfig(theta=theta), context
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=rope.number("factor")), context
    if kind == "dynamic":
        factor = rope.number("factor")
        return RopeConfig(theta=theta, kind=kind, factor=factor, original_context=context), int(factor * context)
    original = (config.integer("original_max_position_embeddings", None)
                or rope.integer("original_max_position_embeddings", context))
    if kind == "llama3":
        return RopeConfig(
            theta=theta, kind=kind, factor=rope.number("factor"), original_context=original,
            low_freq_factor=rope.number("low_freq_factor"), high_freq_factor=rope.number("high_freq_factor"),
        ), context
    if kind == "yarn":
        factor = rope.number("factor", None) or context / original
        return RopeConfig(
            theta=theta, kind=kind, factor=factor, original_context=original,
            beta_fast=rope.number("beta_fast", 32.0), beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.number("attention_factor", None), mscale=rope.number("mscale", None),
            mscale_all_dim=rope.number("mscale_all_dim", None), truncate=rope.boolean("truncate", True),
        ), max(context, int(factor * original))
    raise config.error(f"{key}: RoPE type {kind} is not supported (default, linear, dynamic, yarn, llama3)")


def _special_tokens(folder: Path, config: Fields, defaults: dict) -> tuple[tuple[int, ...], int | None]:
    path = folder / "generation_config.json"
    generation = Fields(read_json(path) if path.exists() else {}, str(path))
    eos = generation.token_ids("eos_token_id")
    if eos is None:
        # An explicit null means none, an absent key the family's default.
        eos = config.token_ids("eos_token_id") or (() if "eos_token_id" in config.values else defaults["eos"])
    bos = config.token_ids("bos_token_id") or generation.token_ids("bos_token_id")
    if bos is None and "bos_token_id" not in config.values and defaults["bos"] is not None:
        bos = (defaults["bos"],)
    return eos, bos[0] if bos else None
