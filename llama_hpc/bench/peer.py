"""Speed of llama.cpp on the same machine, from its own tools: llama-bench, llama-batched-bench, llama-quantize.

The tools run one at a time, on the cores of this process. What they print is described in
tools/{llama-bench,batched-bench,quantize}/README.md of llama.cpp, the GGUF format in its ggml/docs/gguf.md.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.errors import UsageError
from llama_hpc.model.config import ModelConfig
from llama_hpc.weights.layout import gguf_name, tensor_shapes

TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize")
PURE = "-pure"                  # behind the name of a format: embedding and head too
BANK = 1 << 22                  # random weights that are drawn; larger tensors repeat them


class Peer:
    """The tools of one build of llama.cpp. ``timeout`` bounds every run of a tool, in seconds.

    ``environment`` is theirs (None: that of this process, in which settings of our own threads may have been made).
    """

    def __init__(self, folder: str | Path, timeout: float = 1800.0, environment: Mapping[str, str] | None = None):
        """``folder`` is a build folder or its bin/. Raises UsageError naming the tools that are in neither."""
        self.timeout, self.environment = timeout, environment
        found = {tool: _find(Path(folder), tool) for tool in TOOLS}
        if missing := [tool for tool, path in found.items() if path is None]:
            raise UsageError(f"{folder} has no {', '.join(missing)}, nor has its bin/; give the folder in which llama.cpp was "
                             f"built (cmake --build . --target {' '.join(missing)})")
        self.tools: dict[str, Path] = {tool: path for tool, path in found.items() if path}

    def decode(self, model: str | Path, threads: int, tokens: int) -> float:
        """Tokens a second of one sequence that grows from nothing by ``tokens`` tokens. Raises BenchmarkError."""
        return self._bench(model, threads, prompt=0, tokens=tokens)

    def prefill(self, model: str | Path, threads: int, tokens: int) -> float:
        """Tokens a second of a prompt of ``tokens`` tokens; logits of the last one only. Raises BenchmarkError."""
        return self._bench(model, threads, prompt=tokens, tokens=0)

    def batched(self, model: str | Path, threads: int, batch: int, prompt: int, tokens: int) -> float:
        """Tokens a second of ``batch`` sequences together that grow from ``prompt`` by ``tokens`` tokens each.

        Counts the tokens of all sequences, over the time of decoding alone. Raises BenchmarkError.
        """
        output = self._run("llama-batched-bench", "-m", model, "-c", batch * (prompt + tokens), "-npp", prompt, "-ntg", tokens,
                           "-npl", batch, "-t", threads, "-tb", threads, "--output-format", "jsonl")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        return _rate("llama-batched-bench", lines[-1] if lines else output, "speed_tg")

    def quantised(self, model: str | Path, kind: str, folder: str | Path, pure: bool = False) -> Path:
        """``model`` as Q4_0, Q3_K_S, IQ3_S, …, made on first use and kept in ``folder``. Raises BenchmarkError.

        With ``pure`` the embedding and the head are of this kind too, rather than of one that llama-quantize chooses. The
        file's name has a hash of the model's path, size and time of change: another model gets a file of its own.
        """
        model, folder = Path(model).resolve(), Path(folder)
        if not model.is_file():
            raise UsageError(f"{model}: no such GGUF file")
        identity = f"{model} {model.stat().st_size} {model.stat().st_mtime_ns}"
        target = folder / f"{model.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-{kind}{PURE * pure}.gguf"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            try:
                self._run("llama-quantize", "--allow-requantize", *["--pure"] * pure, model, partial, kind)
                if not partial.exists():
                    raise BenchmarkError(f"llama-quantize wrote no {kind} file of {model}")
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        return target

    def _bench(self, model: str | Path, threads: int, prompt: int, tokens: int) -> float:
        output = self._run("llama-bench", "-m", model, "-t", threads, "-p", prompt, "-n", tokens, "-r", 1, "-o", "json")
        return _rate("llama-bench", output, "avg_ts")

    def _run(self, tool: str, *arguments: object) -> str:
        """What the tool printed on stdout. Raises BenchmarkError with the last line of its stderr."""
        command = [str(self.tools[tool]), *map(str, arguments)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.timeout,
                                  encoding="utf-8", errors="replace", env=self.environment)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{' '.join(command)}: not finished after {self.timeout:g} s") from None
        except OSError as error:
            raise BenchmarkError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BenchmarkError(f"{' '.join(command)}: exit code {done.returncode}: {lines[-1].strip()}")
        return done.stdout


@dataclass(frozen=True)
class PeerModel:
    """A file that the tools of ``peer`` run; ``format``: Q4_0, Q4_0-pure, …"""

    peer: Peer
    format: str
    path: Path


def peer_models(peer: Peer, source: Path, formats: list[str], folder: Path) -> list[PeerModel]:
    """The GGUF file ``source`` in these formats, kept in ``folder``. Raises as ``Peer.quantised``."""
    def made(name: str) -> Path:
        return peer.quantised(source, name.removesuffix(PURE), folder, name.endswith(PURE))
    return [PeerModel(peer, name, made(name)) for name in formats]


def random_gguf(config: ModelConfig, name: str, folder: Path) -> Path:
    """``write_random_gguf`` in float16 as a file of ``folder``, made on first use. Raises as it does."""
    path = folder / f"{name}-{config.num_layers}-layers-f16.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            write_random_gguf(config, partial).replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def write_random_gguf(config: ModelConfig, path: str | Path, kind: str = "f16") -> Path:
    """A model of the shapes in ``config`` with random weights, as a GGUF file that llama.cpp loads and requantises.

    Matrices are of type ``kind``, which is f32, f16 or one that the gguf package can quantise to (q8_0, q4_0, …), and f16
    where their rows are no multiple of its blocks; norms are ones and biases zeros, float32. There is no vocabulary, only its
    size. Sliding windows and RoPE scaling, which llama.cpp's files of these architectures hardly express, are left out.
    Needs the memory of one tensor. Raises UsageError for other kinds and for mixtures of experts.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    if config.num_experts:
        raise UsageError(f"no random GGUF file for a mixture of experts ({config.num_experts} experts): dense models only")
    try:
        wanted = types[kind.upper()]
        banks = {tensor_type: _random_bytes(tensor_type) for tensor_type in (wanted, types.F16)}
    except (KeyError, NotImplementedError):
        raise UsageError(f"no random GGUF file of type {kind}; take f32, f16 or a type that the gguf package can make, such as "
                         "q8_0 or q4_0, and let llama-quantize do the rest") from None
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    writer = gguf.GGUFWriter(path, "llama" if config.family.startswith("mistral") else config.family)
    _add_metadata(writer, config)
    tensors = []
    for name, shape in tensor_shapes(config).items():
        tensor_type = types.F32 if len(shape) == 1 else wanted if shape[-1] % block == 0 else types.F16
        stored = gguf.quant_shape_to_byte_shape(shape, tensor_type)
        tensors.append((name, len(shape) == 1, tensor_type, prod(stored)))
        writer.add_tensor_info(gguf_name(name), stored, np.dtype(np.uint8), prod(stored), tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, is_vector, tensor_type, size in tensors:
        vector = np.full(size // 4 if is_vector else 0, not name.endswith("bias"), np.float32)
        writer.write_tensor_data(vector.view(np.uint8) if is_vector else np.resize(banks[tensor_type], size))
    writer.close()
    return Path(path)


def _add_metadata(writer, config: ModelConfig) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _random_bytes(tensor_type) -> np.ndarray:
    """BANK normal weights of standard deviation 0.02 as a tensor of this type stores them: a whole number of its blocks."""
    import gguf

    values = np.random.default_rng(0).standard_normal((BANK // 256, 256), np.float32) * np.float32(0.02)
    return gguf.quants.quantize(values, tensor_type).reshape(-1).view(np.uint8)


def _find(folder: Path, tool: str) -> Path | None:
    return next((path for path in (folder / tool, folder / "bin" / tool) if path.is_file() and os.access(path, os.X_OK)), None)


def _rate(tool: str, text: str, field: str) -> float:
    """The last JSON object's ``field``, which must be above 0."""
    try:
        found = json.loads(text)
        rate = float((found[-1] if isinstance(found, list) else found)[field])
    except (ValueError, LookupError, TypeError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise BenchmarkError(f"{tool} printed no {field} above 0, but {text.strip()[-100:]!r}")
    return rate
