"""Small random checkpoints, made the same everywhere, and what Hugging Face transformers computes with them.

A checkpoint is rebuilt bit for bit from integers: raw Philox4x64-10 words, keyed by the case's seed and the
tensor's name, summed and scaled by one exact product, so neither torch nor a NumPy distribution is involved.
``data/model_reference.npz`` holds the reference values and a SHA-256 of each folder; ``data/make_model_reference.py``
makes it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

REFERENCE_FILE = Path(__file__).parent / "data" / "model_reference.npz"
STORIES = ("stories15M", "stories260K")

_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Case:
    """One checkpoint: its config.json, the seed of weights and prompt, the stored type, the number of files."""

    config: dict
    seed: int
    dtype: str = "float32"
    shards: int = 1
    prompt_length: int = 48


@dataclass(frozen=True)
class Reference:
    """What transformers computes (float32, eager attention, CPU).

    ``prompt_ids`` [P] int32; ``logits`` [R, V] float32 after the prompt positions ``logits_positions`` [R];
    ``greedy_ids`` [64] int32, end tokens ignored; ``margins`` [64] float32, the gap between the two best logits of
    each step as a fraction of that step's logit range. ``config`` has the values transformers read from config.json
    (``windows``: per layer, 0 for none), ``inverse_frequencies`` [head_dim / 2] float32 and ``attention_scaling``
    its rotary tables. ``sha256`` is `folder_hash` of the checkpoint, empty for the stories models.
    """

    prompt_ids: np.ndarray
    logits_positions: np.ndarray
    logits: np.ndarray
    greedy_ids: np.ndarray
    margins: np.ndarray
    inverse_frequencies: np.ndarray
    attention_scaling: float
    config: dict
    sha256: str

    @property
    def logit_range(self) -> float:
        """Largest minus smallest stored logit: the unit in which differences are judged."""
        return float(self.logits.max() - self.logits.min())


def _config(family: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int, **more) -> dict:
    return {
        "architectures": [_ARCHITECTURES[family] + "ForCausalLM"], "model_type": family, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, **more,
    }  # fmt: skip


def _llama(*shape: int, **more) -> dict:
    return _config("llama", *shape, **more)


# Each scaled case reads well beyond original_max_position_embeddings, except `dynamic`: its frequencies depend on the
# length of the text beyond max_position_embeddings, where no fixed answer exists, so the text stays within.
# Old files write rope_theta and rope_scaling (with "type"), new ones rope_parameters: both occur.
_CASES = {
    "llama_mha_tied": Case(_llama(64, 128, 3, 4, 320, tie_word_embeddings=True), 1),
    "llama_gqa": Case(_llama(64, 144, 3, 4, 352, num_key_value_heads=2, head_dim=24, rope_theta=500000.0,
                             eos_token_id=[2, 5]), 200, "float16"),
    "llama_biases": Case(_llama(48, 112, 3, 6, 300, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
                                rms_norm_eps=0.05), 1164, "bfloat16"),
    "llama_odd": Case(_llama(64, 172, 4, 8, 515, num_key_value_heads=4, head_dim=8), 31, shards=3),
    "llama_linear": Case(_llama(64, 128, 3, 4, 320, num_key_value_heads=2, rope_theta=10000.0,
                                rope_scaling={"type": "linear", "factor": 4.0}), 123),
    "llama_dynamic": Case(_llama(64, 128, 2, 4, 320, num_key_value_heads=1, max_position_embeddings=128,
                                 rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 7),
    "llama_yarn": Case(_llama(64, 128, 3, 4, 320, num_key_value_heads=2, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
        "beta_fast": 4.0, "beta_slow": 0.5}), 17, prompt_length=60),
    "llama_yarn_mscale": Case(_llama(96, 128, 2, 3, 320, rope_parameters={
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.4}), 139, prompt_length=60),
    "llama_llama3": Case(_llama(96, 128, 3, 4, 320, num_key_value_heads=2, rope_theta=500000.0, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}), 110, "bfloat16", 2, 60),
    "mistral_window": Case(_config("mistral", 64, 128, 3, 4, 320, num_key_value_heads=2, head_dim=None,
                                   sliding_window=16), 87, "bfloat16", prompt_length=60),
    "qwen2_tied": Case(_config("qwen2", 64, 128, 3, 4, 400, num_key_value_heads=2, tie_word_embeddings=True,
                               rms_norm_eps=1e-6, rope_theta=1000000.0, use_sliding_window=False, sliding_window=16,
                               max_window_layers=1), 259, "bfloat16"),
    "qwen2_window": Case(_config("qwen2", 64, 128, 4, 4, 320, num_key_value_heads=2, use_sliding_window=True,
                                 sliding_window=16, max_window_layers=2), 26, prompt_length=60),
    "qwen2_yarn": Case(_config("qwen2", 64, 128, 3, 2, 320, num_key_value_heads=1, rope_theta=1000000.0, rope_scaling={
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}), 43, prompt_length=60),
    "qwen3": Case(_config("qwen3", 64, 128, 3, 4, 400, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
                          rope_theta=1000000.0, tie_word_embeddings=True), 659, "bfloat16"),
    "qwen3_layer_types": Case(_config("qwen3", 48, 96, 3, 4, 320, num_key_value_heads=2, head_dim=16,
                                      attention_bias=True, use_sliding_window=True, sliding_window=12, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0}), 295, "float16", prompt_length=60),
    "smollm": Case(_llama(72, 192, 3, 9, 400, num_key_value_heads=3, tie_word_embeddings=True, rope_theta=100000.0),
                   141, "bfloat16"),
}  # fmt: skip
CASES = tuple(_CASES)


def case(name: str) -> Case:
    """The definition of one of `CASES`."""
    return _CASES[name]


def _philox(seed: int, label: str, words: int) -> np.ndarray:
    """``words`` uint64 of the Philox4x64-10 stream keyed by (seed, first 8 bytes of SHA-256 of the label)."""
    word = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    return np.random.Philox(key=np.array([seed, word], np.uint64)).random_raw(words)


def bell(seed: int, label: str, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Float32 values of nearly normal distribution: the sum of four 16-bit integers, centred, times one factor."""
    raw = _philox(seed, label, prod(shape)).view(np.uint16).reshape(-1, 4)
    centred = raw.sum(axis=1, dtype=np.int64) - 2 * 65535
    return (centred * (deviation / 37837.227)).astype(np.float32).reshape(shape)


def prompt(name: str) -> np.ndarray:
    """The prompt of a case: int32 token ids [P], any of the vocabulary."""
    this = _CASES[name]
    words = _philox(this.seed, "prompt", this.prompt_length)
    return (words % np.uint64(this.config["vocab_size"])).astype(np.int32)


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and [out, in] shapes of a checkpoint, in file order."""
    family, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_size, kv_size = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    projections = {"self_attn.q_proj": (q_size, hidden), "self_attn.k_proj": (kv_size, hidden),
                   "self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, q_size),
                   "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
                   "mlp.down_proj": (hidden, ffn)}  # fmt: skip
    # Qwen2 always has biases on q, k and v; attention_bias puts them on q, k, v and o.
    biased = ["self_attn.q", "self_attn.k", "self_attn.v"] if family == "qwen2" else []
    biased += ["self_attn."] if config.get("attention_bias") else []
    biased += ["mlp."] if config.get("mlp_bias") else []

    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for part, shape in projections.items():
            shapes[f"{prefix}{part}.weight"] = shape
            if part.startswith(tuple(biased)):
                shapes[f"{prefix}{part}.bias"] = shape[:1]
        if family == "qwen3":
            shapes |= {f"{prefix}self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def weights(name: str) -> dict[str, np.ndarray]:
    """Every tensor of a case as float32, before it is rounded to the stored type.

    The scales make each part matter: scores with a spread of about two, so that attention picks positions; layers
    that outweigh the embedding, so that tied models do not repeat their input; norms and biases far from trivial.
    """
    this = _CASES[name]

    def tensor(label: str, shape: tuple[int, ...]) -> np.ndarray:
        if label.endswith("norm.weight"):
            return np.float32(1) + bell(this.seed, label, shape, 0.2)
        if label.endswith(".bias"):
            return bell(this.seed, label, shape, 0.3)
        if label.endswith(("embed_tokens.weight", "lm_head.weight")):
            return bell(this.seed, label, shape, 0.15 if this.config.get("tie_word_embeddings") else 0.5)
        gain = 1.5 if ".q_proj" in label or ".k_proj" in label else 1.0
        return bell(this.seed, label, shape, gain * shape[1] ** -0.5)

    return {label: tensor(label, shape) for label, shape in tensor_shapes(this.config).items()}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values in a stored type, rounded to the nearest (half to even); bfloat16 as uint16 bit patterns."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def _write_safetensors(path: Path, shapes: dict, dtype: str, chunks: Callable[[str], Iterable[bytes]]) -> None:
    """One file: the length of the header, the header (JSON, padded to 8 bytes), then every tensor's bytes in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * (4 if dtype == "float32" else 2)
        header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.writelines(chunks(name))


def _write_folder(folder: Path, config: dict, shards: list[dict], dtype: str, chunks: Callable) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=1))
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0], dtype, chunks)
        return folder
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shapes in zip(files, shards, strict=True):
        _write_safetensors(folder / file, shapes, dtype, chunks)
    size = sum(prod(shape) for shapes in shards for shape in shapes.values()) * (4 if dtype == "float32" else 2)
    placed = {name: file for file, shapes in zip(files, shards, strict=True) for name in shapes}
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def write_checkpoint(name: str, folder: str | Path) -> Path:
    """Write one of `CASES` as a Hugging Face folder (config.json, safetensors) and return the folder."""
    this, tensors = _CASES[name], weights(name)
    shapes = list(tensor_shapes(this.config).items())
    # Tensors are dealt out in turn, so the parts of one layer lie in different files.
    shards = [dict(shapes[i :: this.shards]) for i in range(this.shards)]
    return _write_folder(Path(folder), this.config, shards, this.dtype,
                         lambda label: [encode(tensors[label], this.dtype).tobytes()])  # fmt: skip


def write_random_llama(folder: str | Path, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int,
                       dtype: str = "float32", seed: int = 0, shard_bytes: int = 1 << 30) -> Path:  # fmt: skip
    """Stream an untied Llama checkpoint of any size to disk in files of ``shard_bytes``, with some 30 MB of memory.

    One random block of a prime number of values is repeated (so rows differ), with deviation 1 / sqrt(hidden);
    norm weights are 1.
    """
    config = _llama(hidden, ffn, layers, heads, vocab, num_key_value_heads=kv_heads, max_position_embeddings=2048)
    shards, room = [{}], shard_bytes
    shapes = tensor_shapes(config)
    for label, shape in shapes.items():
        size = prod(shape) * (4 if dtype == "float32" else 2)
        if shards[-1] and size > room:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][label], room = shape, room - size
    block = encode(bell(seed, "block", (1048573,), hidden**-0.5), dtype)

    def chunks(label: str) -> Iterable[bytes]:
        left, start = prod(shapes[label]), int(_philox(seed, label, 1)[0] % np.uint64(block.size))
        if label.endswith("norm.weight"):
            yield encode(np.ones(left, np.float32), dtype).data
            return
        while left:
            piece = block[start : start + left]
            yield piece.data
            left, start = left - piece.size, 0

    return _write_folder(Path(folder), config, shards, dtype, chunks)


def folder_hash(folder: str | Path) -> str:
    """SHA-256 over the names and bytes of a folder's files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def stories_folder(name: str) -> Path | None:
    """Folder of one of `STORIES` under LLAMA_HPC_TEST_DATA, or None where that is not set or has no such model."""
    root = os.environ.get("LLAMA_HPC_TEST_DATA")
    folder = Path(root) / "models" / name if root else None
    return folder if folder and (folder / "config.json").exists() else None


@cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(REFERENCE_FILE, allow_pickle=False) as file:
        return dict(file)


def reference(name: str) -> Reference:
    """Stored reference values of one of `CASES` or `STORIES`."""
    prefix = name + "/"
    values = {key.removeprefix(prefix): value for key, value in _stored().items() if key.startswith(prefix)}
    facts = json.loads(str(values.pop("facts")))
    return Reference(**values, **facts)
