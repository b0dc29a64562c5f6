"""How byte-level BPE vocabularies cut a text into words before merging, by the name that GGUF files give it.

A GGUF file holds tokens and merges, and only a name (``tokenizer.ggml.pre``) for the cutting rules. They are the
regular expressions of the original tokenizer.json files. Each pattern cuts the pieces that the one before left;
text that no pattern matches is a piece too.
Source of the names: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf_update.py
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PreTokenizer:
    """Cutting rules and what goes with them.

    ``ignore_merges``: a word that is a token is taken whole. ``add_bos``: whether texts start with BOS where the
    file does not say. ``nfc``: texts are composed (Unicode NFC) first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NEWLINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_EAST_ASIAN = "[\u0800-\u9fa5\uac00-\ud7ff]+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _cl100k(digits: str, word: str = r"[^\r\n\p{L}\p{N}]?\p{L}+", other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The pattern family of OpenAI's cl100k: English suffixes, words, digits, other signs, line ends, spaces."""
    return f"{_SUFFIXES}|{word}|{digits}|{other}|{_NEWLINES}"


_gpt2 = PreTokenizer((_GPT2,))
_single_digits = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_chatglm = PreTokenizer(_llama3.patterns)
_qwen2 = PreTokenizer((_cl100k(r"\p{N}"),), nfc=True)
_marked_words = _cl100k(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_gpt4o_words = _CASED % (_SUFFIXES + "?", _SUFFIXES + "?")
_gpt4o = PreTokenizer((rf"{_gpt4o_words}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES}",))
_deepseek_words = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
_deepseek3 = PreTokenizer(
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", rf"{_ASCII_PUNCTUATION}[A-Za-z]+|{_deepseek_words}|{_NEWLINES}")
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ["gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "exaone4", "trillion", "granite-docling", "gigachat"], _gpt2
    ),
    **dict.fromkeys(["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"], _single_digits),
    "command-r": replace(_single_digits, nfc=True),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"], _llama3),
    **dict.fromkeys(["chatglm-bpe", "glm4", "dbrx", "smaug-bpe"], _chatglm),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "megrez"], _qwen2),
    **dict.fromkeys(["stablelm2", "hunyuan", "grok-2", "solar-open"], replace(_qwen2, nfc=False)),
    "qwen35": PreTokenizer((_marked_words,)),
    "tekken": PreTokenizer(
        (_CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES}",), ignore_merges=True, add_bos=True
    ),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "minimax-m2"], _gpt4o),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "joyai-llm"], _deepseek3),
    "seed-coder": PreTokenizer((_cl100k(r"\p{N}", other=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
}
