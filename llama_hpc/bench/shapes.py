"""Shapes of well-known models, as their config.json files have them: benchmarks need no checkpoint."""

from dataclasses import replace

from llama_hpc.errors import UsageError
from llama_hpc.model.config import ModelConfig, RopeConfig


def _shape(family: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int,
           theta: float = 1e4, **more) -> ModelConfig:
    return ModelConfig(family, hidden, ffn, layers, heads, kv_heads, hidden // heads, vocab, context, rope=RopeConfig(theta),
                       **more)


SHAPES = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e5, tie_embeddings=True),
    "tinyllama": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "llama3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 128256, 131072, 5e5, tie_embeddings=True),
    "llama2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama2-70b": _shape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 8192, 5e5),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, windows=(4096,) * 32),
    "qwen2-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e6, tie_embeddings=True, attention_bias=True,
                         norm_eps=1e-6),
    "qwen2-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, 1e6, attention_bias=True, norm_eps=1e-6),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, 1e6, qk_norm=True, norm_eps=1e-6),
}


def shape_config(name: str, layers: int | None) -> ModelConfig:
    """The shape of this name, with its first ``layers`` layers (None: all). Raises UsageError where it has not so many."""
    config = SHAPES[name]
    if layers is None:
        return config
    if layers > config.num_layers:
        raise UsageError(f"--layers {layers}: {name} has {config.num_layers} layers; take 1 to {config.num_layers}")
    return replace(config, num_layers=layers, windows=config.windows[:layers])
