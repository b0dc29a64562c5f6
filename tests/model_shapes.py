"""The shapes of well-known models, as their config.json files have them."""

from llama_hpc.model.config import ModelConfig


def _shape(family, hidden, ffn, layers, heads, kv_heads, vocab, context, **more):
    return ModelConfig(family, hidden, ffn, layers, heads, kv_heads, hidden // heads, vocab, context, **more)


SHAPES = {
    "SmolLM2-135M": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, tie_embeddings=True),
    "TinyLlama-1.1B": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "Llama-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "Llama-3-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 8192),
    "Qwen2-0.5B": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tie_embeddings=True, attention_bias=True),
    "stories260K": _shape("llama", 64, 172, 5, 8, 4, 512, 512, tie_embeddings=True),
}
