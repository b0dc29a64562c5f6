"""sentencepiece vocabularies, from tokenizer.model and rebuilt from GGUF, against sentencepiece itself."""

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFWriter

from llama_hpc.errors import CheckpointError
from llama_hpc.text import load_tokenizer

REFERENCE = json.loads((Path(__file__).parents[1] / "data/tokenizer_reference.json").read_text(encoding="utf-8"))
TEXTS = [case["text"] for case in REFERENCE["smollm2"]] + ["▁ ▁▁x", "<0x41>", "  x", "naïve 🦙\n\n\n  end "]


def small_model() -> bytes:
    """A BPE model with byte fallback, trained on the texts without the rarer characters."""
    lines = [line for text in TEXTS for line in text.split("\n") if line.strip("\0")] * 3
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["small", "stories15M"])
def model(request) -> bytes:
    if request.param == "small":
        return small_model()
    if "LLAMA_HPC_TEST_DATA" not in os.environ:
        pytest.skip("needs LLAMA_HPC_TEST_DATA")
    return Path(os.environ["LLAMA_HPC_TEST_DATA"], "models/stories15M/tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def oracle(model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def in_folder(path: Path, model: bytes, settings: dict | None = None):
    (path / "tokenizer.model").write_bytes(model)
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return load_tokenizer(path)


def in_gguf(path: Path, sp: sentencepiece.SentencePieceProcessor, extra=(), **settings):
    """The same vocabulary in a GGUF file; ``extra``: further (token, type) pairs."""
    count = sp.vocab_size()
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(count)]
    writer = GGUFWriter(path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model(settings.get("model", "llama"))
    writer.add_token_list([*(sp.id_to_piece(i) for i in range(count)), *(token for token, _ in extra)])
    writer.add_token_scores([*(sp.get_score(i) for i in range(count)), *(-1000.0 for _ in extra)])
    writer.add_token_types([*kinds, *(kind for _, kind in extra)])
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if key in settings:
            writer.add_bool(f"tokenizer.ggml.{key}", settings[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(path / "vocabulary.gguf")


@pytest.fixture(scope="module", params=["folder", "gguf"])
def tokenizer(request, tmp_path_factory, model, oracle):
    path = tmp_path_factory.mktemp(request.param)
    return in_folder(path, model) if request.param == "folder" else in_gguf(path, oracle)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_text_are_those_of_sentencepiece(tokenizer, oracle, text):
    ids = tokenizer.encode(text, add_special=False)
    assert ids == oracle.encode(text)
    assert tokenizer.encode(text) == [oracle.bos_id(), *ids]
    assert tokenizer.decode(ids) == oracle.decode(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_ends_of_text(tokenizer, oracle):
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), oracle.vocab_size())
    assert (tokenizer.id_of("</s>"), tokenizer.id_of("<unk>"), tokenizer.id_of("no such piece")) == (2, 0, None)


def test_special_tokens_in_the_text_are_one_token_each(tokenizer, oracle):
    ids = tokenizer.encode("is<s> the</s><unk>", add_special=False)
    assert ids == [*oracle.encode("is"), 1, *oracle.encode(" the"), 2, 0]
    assert tokenizer.decode(ids) == "is  the"
    assert tokenizer.decode(ids, skip_special=False) == "is<s>  the</s><unk>"


def test_a_continuation_keeps_its_leading_space(tokenizer):
    prompt, answer = tokenizer.encode("over the"), tokenizer.encode("lazy dog")[1:]
    assert tokenizer.decode(answer) == "lazy dog"
    assert tokenizer.decode(prompt) + tokenizer.decode(answer, continuation=True) == "over the lazy dog"


def test_bytes_join_to_characters_and_stray_ones_become_replacement_characters(tokenizer):
    first = tokenizer.id_of("<0x00>")
    llama = [first + byte for byte in "🦙".encode()]
    assert tokenizer.decode(llama) == "🦙"
    assert tokenizer.decode([*llama, llama[-1], first + 0x41, llama[0]]) == "🦙\ufffdA\ufffd"


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""


def test_tokens_added_beside_the_model(tmp_path, model, oracle):
    count = oracle.vocab_size()
    added = {
        str(count): {"content": "<|im_start|>", "special": True},
        str(count + 1): {"content": "<|im_end|>", "special": True, "rstrip": True},
        str(count + 2): {"content": "<tool>", "special": False},
    }
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "add_bos_token": False, "legacy": False}
    tokenizer = in_folder(tmp_path, model, settings)
    ids = tokenizer.encode("the<|im_start|>x<|im_end|> \n<tool>")
    assert ids == [*oracle.encode("the"), count, oracle.piece_to_id("x"), count + 1, count + 2]
    assert tokenizer.decode(ids) == "thex<tool>"
    assert tokenizer.eos_ids == (count + 1,)
    assert tokenizer.vocab_size == count + 3


def test_older_files_for_added_tokens(tmp_path, model, oracle):
    count = oracle.vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": count, "<x>": count + 1}), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}', encoding="utf-8")
    tokenizer = in_folder(tmp_path, model, {"add_eos_token": True})
    ids = tokenizer.encode("<pad><x>")
    assert ids == [1, count, count + 1, 2]
    assert tokenizer.decode(ids) == "<x>"


def test_malformed_added_tokens_are_an_error(tmp_path, model):
    with pytest.raises(CheckpointError, match="added tokens of the tokenizer are malformed"):
        in_folder(tmp_path, model, {"added_tokens_decoder": {"5": "text"}})


def test_gguf_settings_for_bos_eos_space_and_user_defined_tokens(tmp_path, oracle):
    count = oracle.vocab_size()
    extra = [("<|im_end|>", 3), ("<tool>", 4)]
    tokenizer = in_gguf(tmp_path, oracle, extra, add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    ids = tokenizer.encode("x<tool>x<|im_end|>")
    assert ids == [oracle.piece_to_id("x"), count + 1, oracle.piece_to_id("x"), count, 2]
    assert tokenizer.decode(ids) == "x<tool>x"
    assert tokenizer.decode(tokenizer.encode(" x")) == " x"
    assert tokenizer.eos_ids == (2, count)


def test_an_unknown_kind_of_tokenizer_in_gguf_is_named(tmp_path, oracle):
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.model is 't5'; known are 'llama'.* 'gpt2'"):
        in_gguf(tmp_path, oracle, model="t5")


def test_a_gguf_file_without_a_vocabulary_gives_none(tmp_path, oracle):
    assert in_gguf(tmp_path, oracle, model="none") is None
