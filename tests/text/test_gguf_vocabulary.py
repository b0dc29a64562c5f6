"""Byte-level BPE vocabularies rebuilt from GGUF against the tokenizer.json that they were made from.

The references name their pre-tokenizers as the original tokenizer.json files do. The merges are learned across word
borders, so that a text cut at the wrong place gives other ids.
"""

import json
import unicodedata
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llama_hpc.errors import CheckpointError
from llama_hpc.text import load_tokenizer
from llama_hpc.text.pretokenizers import PRE_TOKENIZERS

REFERENCE = json.loads((Path(__file__).parents[1] / "data/tokenizer_reference.json").read_text(encoding="utf-8"))
TEXTS = [case["text"] for case in REFERENCE["smollm2"]]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# name in GGUF -> pre-tokenizers of the original tokenizer.json, normalizer, ignore_merges
ORIGINALS = {
    "gpt-2": ([GPT2], None, False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2], None, False),
    "command-r": ([pre_tokenizers.Digits(individual_digits=True), GPT2], normalizers.NFC(), False),
    "llama-bpe": ([split(LLAMA3), BYTES], None, True),
    "dbrx": ([split(LLAMA3), BYTES], None, False),
    "qwen2": ([split(LLAMA3.replace("{1,3}", "")), BYTES], normalizers.NFC(), False),
    "stablelm2": ([split(LLAMA3.replace("{1,3}", "")), BYTES], None, False),
    "gpt-4o": ([split(GPT4O), BYTES], None, False),
    "tekken": ([split(GPT4O.replace(SUFFIX + "?", "").replace("{1,3}", "")), BYTES], None, True),
    "deepseek-v3": ([split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), BYTES], None, False),
}


@pytest.fixture(scope="module")
def trained() -> str:
    """tokenizer.json of a BPE whose merges cross word borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = BYTES
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False, min_frequency=1
    )
    # Pieces of every text from every start: frequent enough in many combinations, merged across all borders.
    pieces = [text[start : start + 9] for text in TEXTS for start in range(0, len(text), 2)]
    tokenizer.train_from_iterator(pieces * 2, trainer)
    content = json.loads(tokenizer.to_str())
    # A word that no merges reach: whole only where a tokenizer looks words up before merging (ignore_merges).
    content["model"]["vocab"]["Ġdecomposed"] = len(content["model"]["vocab"])
    return json.dumps(content)


def write_gguf(path: Path, tokenizer_json: str, pre: str | None, **settings) -> Path:
    model = json.loads(tokenizer_json)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(settings.get("merges", [" ".join(merge) for merge in model["merges"]]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    if "add_bos_token" in settings:
        writer.add_add_bos_token(settings["add_bos_token"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "vocabulary.gguf"


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_those_of_the_original_tokenizer(name, trained, tmp_path):
    steps, normalizer, ignore_merges = ORIGINALS[name]
    content = json.loads(trained)
    content["model"]["ignore_merges"] = ignore_merges
    original = Tokenizer.from_str(json.dumps(content))
    original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        original.normalizer = normalizer
    tokenizer = load_tokenizer(write_gguf(tmp_path, trained, name))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == original.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False)


def test_the_pre_tokenizers_under_test_differ_on_the_texts(trained, tmp_path):
    results = set()
    for name in ORIGINALS:
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(write_gguf(tmp_path / name, trained, name))
        results.add(json.dumps([tokenizer.encode(text, add_special=False) for text in TEXTS]))
    assert len(results) == len(ORIGINALS)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(name, trained, tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path, trained, name))
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[name].nfc else text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == expected


def test_bos_follows_the_file_and_else_the_family(trained, tmp_path):
    plain = load_tokenizer(write_gguf(tmp_path, trained, "smollm"))
    assert plain.encode("a")[0] != 1
    assert load_tokenizer(write_gguf(tmp_path, trained, "llama-bpe")).encode("a") == [1, *plain.encode("a")]
    forced = load_tokenizer(write_gguf(tmp_path, trained, "llama-bpe", add_bos_token=False))
    assert forced.encode("a") == plain.encode("a")


def test_an_end_of_turn_token_ends_answers_too(trained, tmp_path):
    assert load_tokenizer(write_gguf(tmp_path, trained, "qwen2")).eos_ids == (0, 2)


def test_an_unknown_pre_tokenizer_lists_the_known_ones(trained, tmp_path):
    path = write_gguf(tmp_path, trained, "somebody's own")
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre is .*somebody's own.*llama-bpe.*qwen2.*smollm"):
        load_tokenizer(path)


def test_a_file_without_a_pre_tokenizer_uses_the_default(trained, tmp_path):
    named = load_tokenizer(write_gguf(tmp_path, trained, "default"))
    (tmp_path / "unnamed").mkdir()
    unnamed = load_tokenizer(write_gguf(tmp_path / "unnamed", trained, None))
    assert [unnamed.encode(text) for text in TEXTS] == [named.encode(text) for text in TEXTS]


def test_merges_that_do_not_fit_the_vocabulary_are_an_error(trained, tmp_path):
    path = write_gguf(tmp_path, trained, "gpt-2", merges=["no such"])
    with pytest.raises(CheckpointError, match="vocabulary is not consistent"):
        load_tokenizer(path)


def test_a_truncated_file_is_an_error(trained, tmp_path):
    path = write_gguf(tmp_path, trained, "gpt-2")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_tokenizer(path)
