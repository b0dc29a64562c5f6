"""The shape of a model: what every layer of the program needs to know about a checkpoint, and nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``kind`` is ``default``, ``linear``, ``dynamic``, ``yarn`` or ``llama3``.

    ``theta`` is the base. ``factor`` stretches the context; the other fields have the names and meanings of the Hugging
    Face ``rope_scaling`` dictionary (``None``: that kind's default). ``factors`` divides each of the head_dim / 2 inverse
    frequencies (the tensor ``rope_freqs.weight`` of GGUF files).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder-only model of the LLaMA family."""

    family: str                     # llama, mistral, qwen2, qwen3, …: the checkpoint's own word
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False    # biases on q, k, v
    output_bias: bool = False       # a bias on o
    mlp_bias: bool = False          # biases on gate, up, down
    qk_norm: bool = False           # RMS norm of every q and k head, before RoPE
    windows: tuple[int, ...] = ()   # sliding window of each layer in positions, 0: none; empty: none anywhere
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def q_size(self) -> int:
        """Rows of the q projection: num_heads x head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the k (or v) projection: kv_heads x head_dim."""
        return self.kv_heads * self.head_dim

    def window(self, layer: int) -> int:
        """Sliding window of a layer in positions, the current one included; 0 where there is none."""
        return self.windows[layer] if self.windows else 0
