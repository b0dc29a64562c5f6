"""Vocabularies of the ``tokenizers`` package: tokenizer.json, and byte-level BPE rebuilt from a GGUF file."""

from collections.abc import Sequence

import tokenizers


class TokenizersVocabulary:
    """Encode and decode with a ``tokenizers.Tokenizer``.

    ``prefix`` and ``suffix`` are ids to add around a text besides what its post-processor adds.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prefix: Sequence[int] = (), suffix: Sequence[int] = ()):
        # Files saved during training may still cut or pad every text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._anchor = tokenizer.encode("x", add_special_tokens=False).ids[-1:]
        self._anchor_text = tokenizer.decode(self._anchor)

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return self._prefix + ids + self._suffix if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool, continuation: bool) -> str:
        if not continuation:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        # What a decoder strips or joins at the start of a text falls on the anchor, whose text is then cut off.
        text = self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=skip_special)
        return text[len(self._anchor_text) :]

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)
