"""The tokenizer inside a GGUF file: sentencepiece (``llama``) and byte-level BPE (``gpt2``) vocabularies.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (tokenizer). Defaults follow llama.cpp.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.gguf_reader import GgufFile, read_files
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer

KEYS = "tokenizer."

# Values of tokenizer.ggml.token_type, the same numbers as in sentencepiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Tokens that end a turn, looked up by their text where the file does not name one.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")

Get = Callable[..., Any]


def read_gguf(path: Path) -> dict[str, Any] | None:
    """Parts of a Tokenizer: ``vocabulary``, ``bos_id``, ``eos_ids``, ``chat_template``; None without a vocabulary.

    Raises CheckpointError for a file that is damaged, or whose tokenizer or pre-tokenizer is not known here.
    """
    return read_metadata(read_files(path)[0])


def read_metadata(file: GgufFile) -> dict[str, Any] | None:
    """The same from an opened file, of which only the metadata under ``KEYS`` is used."""
    path = file.path

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", default)

    kind = get("model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {kind!r}; known are 'llama' (sentencepiece) and 'gpt2' (BPE); "
            "give prompts as token_ids, or use the Hugging Face folder of the model"
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(get("tokens", []))]
    types = get("token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but {len(types)} token types; fetch the file again")

    def token_id(key: str, default: int | None = None) -> int | None:
        value = get(f"{key}_token_id", default)
        return value if value is not None and 0 <= value < len(tokens) else None

    spm = kind == "llama"
    bos = token_id("bos", 1 if spm else None)
    eos = token_id("eos", 2 if spm else None)
    ends = [eos, token_id("eot"), token_id("eom")]
    if ends[1] is None:
        ends += [tokens.index(text) for text in _END_OF_TURN if text in tokens][:1]
    rules = None if spm else _pre_tokenizer(path, get("pre", "default"))
    add_bos = get("add_bos_token", True if spm else rules.add_bos)
    around = {
        "prefix": [bos] if add_bos and bos is not None else [],
        "suffix": [eos] if get("add_eos_token", False) and eos is not None else [],
    }
    # Both packages report a vocabulary that does not fit together by exceptions of their own.
    try:
        vocabulary = _spm(get, tokens, types, around) if spm else _bpe(get, tokens, types, rules, around)
    except Exception as error:
        raise CheckpointError(f"{path}: the vocabulary is not consistent: {error}; fetch the file again") from error
    return {
        "vocabulary": vocabulary,
        "bos_id": bos,
        "eos_ids": [i for i in ends if i is not None],
        "chat_template": file.get("tokenizer.chat_template"),
    }


def _pre_tokenizer(path: Path, name: str) -> PreTokenizer:
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}; "
            "give prompts as token_ids, or use the Hugging Face folder of the model"
        )
    return PRE_TOKENIZERS[name]


def _bpe(get: Get, tokens: list[str], types: list[int], rules: PreTokenizer, around: dict):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from .fast import TokenizersVocabulary

    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A space can begin the left part of a merge in no byte-level vocabulary, so the first one separates.
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", [])]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        texts = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
        added = [AddedToken(text, normalized=False, special=special) for text in texts]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return TokenizersVocabulary(tokenizer, **around)


def _spm(get: Get, tokens: list[str], types: list[int], around: dict):
    from .spm import AddedToken, SentencePieceVocabulary, build_model

    unknown = get("unknown_token_id", 0)
    scores = get("scores", [])
    if len(scores) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(scores)} scores")
    pieces, kinds, added = [], [], []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        matched = kind in (UNKNOWN, CONTROL, USER_DEFINED)
        if matched:
            added.append(AddedToken(token, i, special=kind != USER_DEFINED))
        # What is matched in the text beforehand must not be matched again; a model has one unknown piece.
        kinds.append(UNKNOWN if i == unknown else CONTROL if matched else kind)
        pieces.append(token)
    model = build_model(pieces, scores, kinds, get("add_space_prefix", True))
    return SentencePieceVocabulary(model, added, **around)
