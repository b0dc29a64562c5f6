"""Small checkpoints, whole and damaged in every way that a user can meet."""

import json
import struct
from pathlib import Path

import numpy as np
import reference_gguf
from reference_models import write_checkpoint, write_random_llama

SMALL = "llama_mha_tied"        # 3 layers, 4 heads, hidden 64, FFN 128, vocabulary 320, context 256, one file
# The last rows and columns of the matrices are held by the last tensor rank alone.
WIDE = {"hidden": 96, "ffn": 2048, "layers": 3, "heads": 3, "kv_heads": 3, "vocab": 64}


class Models:
    """Paths of models by name, each made in ``folder`` when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            make, *arguments = MODELS[name]
            self._made[name] = make(self.folder / name, *arguments)
        return self._made[name]


def _absent(path):
    return path


def _edited(folder, **changes):
    """config.json with other values."""
    write_checkpoint(SMALL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _without(folder, name, case=SMALL):
    write_checkpoint(case, folder)
    (folder / name).unlink()
    return folder


def _bytes(folder, change, name="model.safetensors"):
    """One file of the folder changed by a function of its bytes."""
    write_checkpoint(SMALL, folder)
    file = folder / name
    file.write_bytes(change(file.read_bytes()))
    return folder


def _gguf(path, change):
    path = reference_gguf.write_gguf(SMALL, path.with_suffix(".gguf"))
    path.write_bytes(change(path.read_bytes()))
    return path


def _replaced(old, new):
    def change(data):
        assert len(old) == len(new) and old in data
        return data.replace(old, new, 1)
    return change


def _gguf_number(key, skip, value):
    """The uint32 that lies ``skip`` bytes after a key or a tensor's name."""
    def change(data):
        place = data.index(key) + len(key) + skip
        return data[:place] + struct.pack("<I", value) + data[place + 4 :]
    return change


def _with_tokenizer(folder):
    """A vocabulary of words, no chat template."""
    import tokenizers

    write_checkpoint(SMALL, folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4} | {f"word{i}": i for i in range(5, 320)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _poisoned(folder, tensor, row, column, value=np.nan):
    """One weight of a random Llama of the size `WIDE` replaced."""
    write_random_llama(folder, **WIDE)
    file = folder / "model.safetensors"
    with file.open("r+b") as data:
        size = int.from_bytes(data.read(8), "little")
        entry = json.loads(data.read(size))[tensor]
        width = entry["shape"][-1]
        height = entry["shape"][0] if len(entry["shape"]) == 2 else 1
        place = row % height * width + column % width
        data.seek(8 + size + entry["data_offsets"][0] + 4 * place)
        data.write(struct.pack("<f", value))
    return folder


_LAYER = "model.layers.1."
MODELS = {
    "small": (lambda folder: write_checkpoint(SMALL, folder),),
    "two_heads": (lambda folder: write_checkpoint("qwen2_yarn", folder),),
    "two_layers_dynamic": (lambda folder: write_checkpoint("llama_dynamic", folder),),
    "text": (_with_tokenizer,),
    "absent": (_absent,),
    "absent_gguf": (lambda path: path.with_suffix(".gguf"),),
    "no_config": (_without, "config.json"),
    "no_weights": (_without, "model.safetensors"),
    "no_shard": (_without, "model-00002-of-00003.safetensors", "llama_odd"),
    "config_not_json": (_bytes, lambda data: data[:-2], "config.json"),
    "truncated": (_bytes, lambda data: data[: len(data) // 2]),
    "unknown_architecture": (lambda folder: _edited(folder, architectures=["FalconForCausalLM"], model_type="falcon"),),
    "unknown_type": (_bytes, _replaced(b'"dtype": "F32"', b'"dtype": "F64"')),
    "contradiction": (lambda folder: _edited(folder, intermediate_size=160),),
    "gguf_not_one": (_gguf, lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "gguf_truncated": (_gguf, lambda data: data[:-1000]),
    "gguf_truncated_header": (_gguf, lambda data: data[:1000]),
    "gguf_unknown_architecture": (_gguf, _replaced(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gptjx")),
    # After a tensor's name: the number of dimensions, two sizes, the type.
    "gguf_unknown_type": (_gguf, _gguf_number(b"blk.1.ffn_gate.weight", 20, 99)),
    # After a key: the type of the value.
    "gguf_contradiction": (_gguf, _gguf_number(b"llama.feed_forward_length", 4, 160)),
    # Rows that no q3_5 codebook is fitted to, so that only the last tensor rank reads them.
    "nan_column_parallel": (_poisoned, _LAYER + "mlp.gate_proj.weight", -2, -1),
    "nan_row_parallel": (_poisoned, _LAYER + "mlp.down_proj.weight", -2, -1),
    "nan_attention_output": (_poisoned, _LAYER + "self_attn.o_proj.weight", -1, -1),
    "nan_embedding": (_poisoned, "model.embed_tokens.weight", -1, -1),
    "nan_norm": (_poisoned, "model.layers.2.input_layernorm.weight", 0, -1),
    "infinite_head": (_poisoned, "lm_head.weight", -1, -1, np.inf),
    "large": (_poisoned, _LAYER + "self_attn.v_proj.weight", -1, -1, 5e6),
    "huge": (_poisoned, _LAYER + "self_attn.v_proj.weight", -1, -1, 1e30),
}  # fmt: skip
