"""The tokenizer of a Hugging Face folder: tokenizer.json, or tokenizer.model with what the files beside it add."""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.fields import read_json

# What ``read_folder`` looks at.
FILES = (
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
)


def read_folder(folder: Path) -> dict[str, Any] | None:
    """Parts of a Tokenizer: ``vocabulary``, ``bos_id``, ``eos_ids``, ``chat_template``; None without a tokenizer.

    End tokens are those of the tokenizer, of generation_config.json and of config.json together. Raises
    CheckpointError for a file that is damaged or of another kind.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    model_bos, model_eos = [], []
    if (folder / "tokenizer.json").is_file():
        vocabulary = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        vocabulary, model_bos, model_eos = _read_tokenizer_model(folder, settings)
    else:
        return None

    def named(key: str) -> list[int]:
        text = _content(settings.get(key))
        token_id = None if text is None else vocabulary.id_of(text)
        return [] if token_id is None else [token_id]

    bos = [*named("bos_token"), *_ids(generation, "bos_token_id"), *_ids(config, "bos_token_id"), *model_bos]
    eos = [*named("eos_token"), *_ids(generation, "eos_token_id"), *_ids(config, "eos_token_id")] or model_eos
    return {
        "vocabulary": vocabulary,
        "bos_id": bos[0] if bos else None,
        "eos_ids": eos,
        "chat_template": _chat_template(folder, settings),
    }


def _read_tokenizer_json(path: Path):
    import tokenizers

    from .fast import TokenizersVocabulary

    # The package raises plain Exception for a file that it cannot parse.
    try:
        return TokenizersVocabulary(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:
        raise CheckpointError(f"{path}: not a valid tokenizer.json: {error}; fetch the file again") from error


def _read_tokenizer_model(folder: Path, settings: dict) -> tuple:
    """The vocabulary, and the BOS and EOS ids of the model itself (lists of one or none)."""
    from .spm import SentencePieceVocabulary, special_ids

    path = folder / "tokenizer.model"
    model = path.read_bytes()
    try:
        bos, eos = special_ids(model)
        vocabulary = SentencePieceVocabulary(
            model,
            _added_tokens(folder, settings),
            prefix=bos if settings.get("add_bos_token", True) else (),
            suffix=eos if settings.get("add_eos_token", False) else (),
            space_after_added=settings.get("legacy") is not False,
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: not a valid sentencepiece model ({error}); fetch it again, or put the model's tokenizer.json "
            "into the folder"
        ) from error
    return vocabulary, bos, eos


def _added_tokens(folder: Path, settings: dict) -> list:
    """Tokens beside the model, from tokenizer_config.json and the older added_tokens.json."""
    from .spm import AddedToken

    shown = _read_json(folder / "special_tokens_map.json").values()
    special = {_content(token) for value in shown for token in (value if isinstance(value, list) else [value])}
    tokens = {}
    try:
        for content, token_id in _read_json(folder / "added_tokens.json").items():
            tokens[int(token_id)] = AddedToken(content, int(token_id), content in special)
        for token_id, token in settings.get("added_tokens_decoder", {}).items():
            content = token["content"]
            is_special = bool(token.get("special")) or content in special
            stripping = bool(token.get("lstrip")), bool(token.get("rstrip"))
            tokens[int(token_id)] = AddedToken(content, int(token_id), is_special, *stripping)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the added tokens of the tokenizer are malformed: {error!r}") from error
    return list(tokens.values())


def _chat_template(folder: Path, settings: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{path}: not UTF-8: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """The text of a special token, written as a string or as an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(config: dict, key: str) -> list[int]:
    """Token ids under ``key``: an integer, a list or null."""
    value = config.get(key)
    return [] if value is None else list(value) if isinstance(value, list) else [value]
