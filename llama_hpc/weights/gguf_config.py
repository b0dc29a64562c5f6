"""The metadata of a GGUF file -> ModelConfig, with the meaning that llama.cpp gives the keys.

Mistral models are of the architecture ``llama``, newer ones ``mistral3``. Both, unlike qwen2 and qwen3, hold the rows
of q and k for rotation in interleaved pairs.
"""

from typing import Any

from ..model.config import ModelConfig, RopeConfig
from .fields import Fields
from .gguf_reader import GgufFile
from .hf_config import unsupported_architecture
from .layout import LAYER_NAMES, MAX_LAYERS, MODEL_NAMES
from .stored import MappedFiles, StoredTensor

ARCHITECTURES = ("llama", "mistral3", "qwen2", "qwen3")
INTERLEAVED = ("llama", "mistral3")
ROPE_FACTORS = "rope_freqs.weight"

# Keys after "{architecture}." that are read below, or that do not change the result.
_KNOWN = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.causal",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type",
}


def read_gguf_config(file: GgufFile, tensors: dict[str, StoredTensor]) -> ModelConfig:
    """The configuration that a GGUF file's metadata and the presence of tensors give.

    Raises CheckpointError naming the key for what is missing, contradictory or not supported.
    """
    architecture = file.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise unsupported_architecture(str(file.path), str(architecture), list(ARCHITECTURES))
    prefix = f"{architecture}."
    values = {key: _uniform(value) for key, value in file.section(prefix).items()}
    fields = Fields(values, str(file.path), prefix)
    _refuse_unsupported(file, fields)

    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    layers = fields.integer("block_count", maximum=MAX_LAYERS)
    head_dim = _head_dim(fields, hidden, heads)
    embedding = tensors.get(MODEL_NAMES["embedding"][1])
    has = {part: f"blk.0.{names[1]}" in tensors for part, names in LAYER_NAMES.items()}
    context = fields.integer("context_length")
    return ModelConfig(
        family=architecture,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", embedding.shape[0] if embedding and embedding.shape else None),
        context_length=context,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(fields, context, _rope_factors(tensors, head_dim, fields)),
        tie_embeddings=MODEL_NAMES["head"][1] not in tensors,
        attention_bias=has["q_bias"],
        output_bias=has["o_bias"],
        mlp_bias=has["gate_bias"],
        qk_norm=architecture == "qwen3",
        windows=_windows(fields, architecture, layers, context),
        eos_token_ids=_end_tokens(file),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
    )


def _uniform(value: Any) -> Any:
    """A per-layer list of equal values is that value."""
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value


def _refuse_unsupported(file: GgufFile, fields: Fields) -> None:
    if (kind := file.get("general.type", "model")) != "model":
        raise fields.error(f"general.type is {kind}, expected model")
    if experts := fields.get("expert_count"):
        raise fields.error(f"{fields.prefix}expert_count = {experts}: mixture of experts is not supported")
    for key, value in fields.values.items():
        # A feature that is switched off (0, false) is no obstacle.
        if key not in _KNOWN and value:
            raise fields.error(f"metadata {fields.prefix}{key} = {str(value)[:60]} is not supported")
    if not fields.boolean("attention.causal", True):
        raise fields.error(f"{fields.prefix}attention.causal = false is not supported")
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor"):
        if (value := fields.get(f"rope.scaling.{key}", 1.0)) != 1.0:
            raise fields.error(f"{fields.prefix}rope.scaling.{key} = {value} is not supported")


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if "attention.key_length" not in fields.values and hidden % heads:
        raise fields.error(f"{fields.prefix}embedding_length {hidden} is not a multiple of attention.head_count "
                           f"{heads}, and no attention.key_length")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for key, feature in (("attention.value_length", "values of another length"),
                         ("rope.dimension_count", "partial rotary embedding")):
        if (found := fields.integer(key, head_dim)) != head_dim:
            raise fields.error(f"{fields.prefix}{key} = {found}, head_dim = {head_dim}: {feature} is not supported")
    return head_dim


def _rope_factors(tensors: dict[str, StoredTensor], head_dim: int, fields: Fields) -> tuple[float, ...] | None:
    tensor = tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.shape != (head_dim // 2,):
        raise fields.error(f"tensor {ROPE_FACTORS} has shape {list(tensor.shape)}, expected [{head_dim // 2}]")
    values = MappedFiles().read(tensor, (0, 1), (0, head_dim // 2))[0].tolist()
    if not all(0 < value < float("inf") for value in values):
        raise fields.error(f"tensor {ROPE_FACTORS} has values that are not above 0")
    return tuple(values)


def _rope(fields: Fields, context: int, factors: tuple[float, ...] | None) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    # llama.cpp: without a type scaling is linear, and a factor of 0 is none.
    kind = fields.get("rope.scaling.type", "linear")
    factor = next((fields.number(key) for key in ("rope.scaling.factor", "rope.scale_linear") if fields.get(key)), 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta, factors=factors)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor, factors=factors)
    if kind != "yarn":
        raise fields.error(f"{fields.prefix}rope.scaling.type = {kind} is not supported (none, linear, yarn)")
    multiplier = fields.get("rope.scaling.yarn_log_multiplier") or None
    return RopeConfig(
        theta=theta, kind="yarn", factor=factor, factors=factors,
        original_context=fields.integer("rope.scaling.original_context_length", context),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=1.0 if multiplier else None, mscale_all_dim=multiplier,
    )


def _windows(fields: Fields, architecture: str, layers: int, context: int) -> tuple[int, ...]:
    window = fields.integer("attention.sliding_window", 0, minimum=0)
    if window == 0 or window >= context:
        return ()
    if architecture not in INTERLEAVED:
        raise fields.error(f"{fields.prefix}attention.sliding_window = {window}: which layers slide is not in the file")
    return (window,) * layers


def _end_tokens(file: GgufFile) -> tuple[int, ...]:
    ids = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))
