"""GGUF files: every tensor type, the order of q and k rows, metadata, split files, and damage."""

import tracemalloc
from contextlib import suppress

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from tiny_checkpoints import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, gguf_tensors, write_gguf

from llama_hpc.errors import CheckpointError
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.gguf_reader import GgufFile
from llama_hpc.weights.layout import gguf_name

REQUIRED_TYPES = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
                  "IQ3_S", "IQ2_XXS"}
BLOCK_TYPES = [t.name for t in GGMLQuantizationType if t in gguf.quants._type_traits]


def test_required_types_are_tested():
    assert set(BLOCK_TYPES) | {"F32", "F16"} >= REQUIRED_TYPES


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_block_types_and_their_slices(tmp_path, type_name):
    kind = GGMLQuantizationType[type_name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    # Any bytes are valid codes, infinities and NaN among the scales included.
    raw = rng.integers(0, 256, (VOCAB, HIDDEN // elements * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind).view(np.uint32)
    tensors = gguf_tensors() | {"token_embd.weight": raw}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, types={"token_embd.weight": kind}))
    assert checkpoint.dtype("embedding") == type_name
    assert checkpoint.shape("embedding") == (VOCAB, HIDDEN)
    assert checkpoint.stored_bytes("embedding") == raw.nbytes
    for rows in (slice(None), slice(7, 8), slice(1, 299), slice(5, 5)):
        for columns in (slice(None), slice(31, 33), slice(256, 512), slice(3, 300), slice(4, 4)):
            found = checkpoint.read("embedding", rows, columns)
            assert found.flags.c_contiguous and found.dtype == np.float32
            np.testing.assert_array_equal(found.view(np.uint32), expected[rows, columns], strict=True)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_come_back(tmp_path, type_name):
    kind, tensors = GGMLQuantizationType[type_name], gguf_tensors()
    original = tensors["output.weight"]
    packed = gguf.quants.quantize(original, kind)
    path = write_gguf(tmp_path / "a.gguf", tensors | {"output.weight": packed}, types={"output.weight": kind})
    error = np.abs(open_checkpoint(path).read("head") - original).max()
    assert error < {"8": 0.03, "5": 0.3, "4": 0.6}[type_name[1]]


@pytest.mark.parametrize("type_name", ["Q4_0", "Q6_K", "IQ3_S"])
def test_decoding_needs_little_beyond_the_result(tmp_path, type_name):
    kind, rows = GGMLQuantizationType[type_name], 8192
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    tensors = gguf_tensors() | {"token_embd.weight": np.zeros((rows, HIDDEN // elements * size), np.uint8)}
    tensors["output.weight"] = np.zeros((rows, HIDDEN), np.float16)
    path = write_gguf(tmp_path / "a.gguf", tensors, types={"token_embd.weight": kind}, changes={"vocab_size": rows})
    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    result = checkpoint.read("embedding")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < result.nbytes + (8 << 20)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_plain_types(tmp_path, dtype, architecture):
    tensors = gguf_tensors(dtype, qkv_bias=architecture == "qwen2")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, architecture))
    assert checkpoint.config.family == architecture
    assert {gguf_name(name) for name in checkpoint.names()} == set(tensors)
    for name in checkpoint.names():
        if architecture == "llama" and name.rsplit(".")[-1] in ("q", "k"):
            continue
        np.testing.assert_array_equal(checkpoint.read(name), tensors[gguf_name(name)].astype(np.float32), strict=True)


def rotate(heads, position, first, second):
    """RoPE (Su et al. 2021) on [heads, head_dim]: pair j = (first[j], second[j]) turns by position * 10000**(-2j/d)."""
    angle = position * 10000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    out = heads.astype(np.float64)
    a, b = out[:, first].copy(), out[:, second].copy()
    out[:, first], out[:, second] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


def scores(q_rows, q_bias, k_rows, k_bias, first, second):
    """Attention scores of every query head at position 11 with its key at position 3, for one fixed input each."""
    x, y = np.linspace(-1, 1, HIDDEN), np.linspace(1, -2, HIDDEN) ** 2
    q = rotate((q_rows @ x + q_bias).reshape(HEADS, HEAD_DIM), 11, first, second)
    k = rotate((k_rows @ y + k_bias).reshape(KV_HEADS, HEAD_DIM), 3, first, second)
    return (q * np.repeat(k, HEADS // KV_HEADS, axis=0)).sum(axis=1)


@pytest.mark.parametrize("architecture", ["llama", "mistral3", "qwen2"])
def test_half_split_rotation_of_q_and_k_gives_the_scores_of_the_file(tmp_path, architecture):
    tensors = gguf_tensors(qkv_bias=True)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, architecture))
    even, half = np.arange(0, HEAD_DIM, 2), np.arange(HEAD_DIM // 2)
    stored = [tensors[f"blk.1.attn_{n}"] for n in ("q.weight", "q.bias", "k.weight", "k.bias")]
    found = [checkpoint.read(f"layers.1.{n}") for n in ("q", "q_bias", "k", "k_bias")]
    interleaved, split = (even, even + 1), (half, half + HEAD_DIM // 2)
    expected = scores(*stored, *(split if architecture == "qwen2" else interleaved))
    np.testing.assert_allclose(scores(*found, *split), expected, rtol=1e-9)
    if architecture != "qwen2":
        assert not np.allclose(scores(*stored, *split), expected, rtol=1e-2)


@pytest.mark.parametrize("name", ["q", "k", "q_bias", "k_bias"])
def test_slices_of_reordered_rows(tmp_path, name):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", gguf_tensors("float16", qkv_bias=True)))
    whole = checkpoint.read(f"layers.0.{name}")
    columns = [None, slice(100, 130)] if whole.ndim == 2 else [None]
    parts = [(32, 64), (64, None), (0, 1), (40, 90), (31, 33), (50, 50), (127, 128)]
    for rows in (slice(*part) for part in parts):
        for span in columns:
            found = checkpoint.read(f"layers.0.{name}", rows, span)
            expected = whole[rows] if span is None else whole[rows, span]
            np.testing.assert_array_equal(found, expected, strict=True)
            assert found.flags.c_contiguous


def test_metadata_and_tensors_are_those_of_the_gguf_package(tmp_path):
    values = {"tokenizer.ggml.tokens": ["a", "", "é\n", "日本"], "tokenizer.ggml.scores": [0.5, -1.0, 0.0, 3.0],
              "tokenizer.ggml.token_type": [1, 2, 3, 6], "tokenizer.ggml.add_bos_token": True,
              "general.name": "tiny", "tokenizer.ggml.eos_token_id": 2}
    path = write_gguf(tmp_path / "a.gguf", gguf_tensors("float16"), values=values)
    reader, found = gguf.GGUFReader(path), GgufFile(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert found.get(key) == field.contents(), key
    assert found.section("tokenizer.ggml.")["tokens"] == values["tokenizer.ggml.tokens"]
    assert found.get("no.such.key", 5) == 5
    assert list(found.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.offset, ours.nbytes, ours.dtype) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)


def opened(tmp_path, tensors=None, architecture="llama", values=None, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    tensors = gguf_tensors() if tensors is None else tensors
    return open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, architecture, values=values, changes=changes))


def test_configuration(tmp_path):
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    found = opened(tmp_path, values=ids).config
    assert (found.family, found.num_layers, found.num_heads, found.kv_heads) == ("llama", LAYERS, HEADS, KV_HEADS)
    assert (found.hidden_size, found.head_dim, found.vocab_size, found.context_length) == (HIDDEN, HEAD_DIM, VOCAB, 128)
    assert found.norm_eps == pytest.approx(1e-5) and found.rope.theta == 10000 and found.rope.kind == "default"
    assert (found.eos_token_ids, found.bos_token_id) == ((2, 7), 1)
    assert not found.tie_embeddings and not found.attention_bias and found.windows == ()


def test_optional_keys(tmp_path):
    tensors = gguf_tensors()
    del tensors["output.weight"]
    found = opened(tmp_path, tensors, vocab_size=None, rope__dimension_count=None, rope__freq_base=None,
                   attention__sliding_window=9, attention__head_count_kv=[KV_HEADS] * LAYERS, expert_count=0).config
    assert found.tie_embeddings and found.vocab_size == VOCAB and found.rope.theta == 10000
    assert found.windows == (9,) * LAYERS and found.kv_heads == KV_HEADS
    biased = opened(tmp_path, gguf_tensors(qkv_bias=True), "qwen2").config
    assert biased.attention_bias and not biased.output_bias


def test_rope_scaling(tmp_path):
    linear = opened(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0).config.rope
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    yarn = opened(tmp_path, rope__scaling__type="yarn", rope__scaling__factor=4.0,
                  rope__scaling__original_context_length=32).config.rope
    assert (yarn.kind, yarn.factor, yarn.original_context, yarn.attention_factor) == ("yarn", 4.0, 32, None)
    scaled = opened(tmp_path, architecture="mistral3", rope__scaling__type="yarn", rope__scaling__factor=4.0,
                    rope__scaling__original_context_length=32, rope__scaling__yarn_log_multiplier=1.0).config.rope
    assert (scaled.mscale, scaled.mscale_all_dim) == (1.0, 1.0)
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    llama3 = opened(tmp_path, gguf_tensors() | {"rope_freqs.weight": factors})
    assert llama3.config.rope.factors == tuple(factors.tolist())
    assert len(llama3.names()) == len(gguf_tensors())


REFUSED = [
    ({"rope__dimension_count": 16}, "partial rotary"),
    ({"attention__value_length": 16}, "value_length = 16"),
    ({"rope__scaling__type": "longrope"}, "longrope"),
    ({"rope__scaling__attn_factor": 1.25}, "attn_factor = 1.25"),
    ({"expert_count": 8}, "mixture of experts"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"attention__temperature_scale": 0.5}, "temperature_scale"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"attention__causal": False}, "causal"),
    ({"attention__head_count": [8, 4]}, "head_count"),
    ({"attention__layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
    ({"block_count": None}, "llama.block_count is missing"),
    ({"block_count": 2**31}, "block_count"),
    ({"block_count": 3}, r"missing tensors blk\.2"),
    ({"block_count": 1}, r"no such tensors blk\.1"),
    ({"embedding_length": 256}, r"token_embd\.weight has shape \[300, 512\], expected \[300, 256\]"),
    ({"vocab_size": 299}, r"token_embd\.weight has shape \[300, 512\], expected \[299, 512\]"),
    ({"context_length": "long"}, "context_length"),
    ({"architecture": "gemma3"}, "architecture gemma3 is not supported"),
    ({"architecture": "smollm3"}, "NoPE"),
    ({"architecture": "qwen2", "attention__sliding_window": 16}, "sliding_window"),
    ({"architecture": "qwen3"}, "attn_q_norm"),
    ({"values": {"general.type": "adapter"}}, "adapter"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        opened(tmp_path, **changes)
    assert "a.gguf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("extra", "message"), [
    ({"rope_factors_long.weight": np.ones(16, np.float32)}, "rope_factors_long"),
    ({"rope_freqs.weight": np.ones(8, np.float32)}, "rope_freqs"),
    ({"rope_freqs.weight": np.zeros(16, np.float32)}, "rope_freqs"),
    ({"token_embd.weight": np.ones((VOCAB, HIDDEN), np.int32)}, r"token_embd\.weight has the type I32"),
])
def test_wrong_tensors(tmp_path, extra, message):
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, gguf_tensors() | extra)


def test_split_files(tmp_path):
    tensors = list(gguf_tensors().items())
    for part in range(3):
        write_gguf(tmp_path / f"a-{part + 1:05}-of-00003.gguf", dict(tensors[part::3]), split=(part, 3))
    for part in (1, 3):
        checkpoint = open_checkpoint(tmp_path / f"a-{part:05}-of-00003.gguf")
        assert [file.name for file in checkpoint.files] == [f"a-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
        np.testing.assert_array_equal(checkpoint.read("head"), dict(tensors)["output.weight"])
    (tmp_path / "a-00002-of-00003.gguf").rename(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing: a-00002-of-00003\.gguf"):
        open_checkpoint(tmp_path / "a-00001-of-00003.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_checkpoint(tmp_path / "b.gguf")


def test_truncation_anywhere_is_a_checkpoint_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", gguf_tensors(), values={"tokenizer.ggml.tokens": ["ab", "c"]})
    data, header = path.read_bytes(), min(t.offset for t in GgufFile(path).tensors.values())
    for size in [*range(0, header, 5), header, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"a\.gguf") as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)
    assert "truncated: tensor" in str(error.value)


def test_other_files(tmp_path):
    path = tmp_path / "a.gguf"
    for data, message in [(b"PK\3\4" + bytes(60), "not a GGUF file"), (b"GGUF\1" + bytes(60), "GGUF version 1"),
                          (b"GGUF\0\0\0\3" + bytes(60), "big-endian")]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_the_header_never_ends_in_another_error(tmp_path, seed):
    path = write_gguf(tmp_path / "a.gguf", gguf_tensors(), values={"tokenizer.ggml.tokens": ["ab", "c"]})
    data, header = path.read_bytes(), min(t.offset for t in GgufFile(path).tensors.values())
    rng = np.random.default_rng(seed)
    with path.open("r+b") as out:
        for _ in range(300):
            place = int(rng.integers(0, header))
            out.seek(place)
            out.write(bytes([int(rng.integers(0, 256))]))
            out.flush()
            with suppress(CheckpointError):
                open_checkpoint(path)
            out.seek(place)
            out.write(data[place:place + 1])
