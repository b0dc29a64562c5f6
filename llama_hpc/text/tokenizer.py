"""The tokenizer of a checkpoint, whatever file it comes from: text to token ids and back, and chat templates."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..errors import UsageError
from ..weights.store import is_store
from .chat import ChatTemplate


class Vocabulary(Protocol):
    """What turns text into ids and back: a ``tokenizers`` or a ``sentencepiece`` model."""

    size: int

    def encode(self, text: str, add_special: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool, continuation: bool) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str | None: ...


class Tokenizer:
    """Text to token ids and back, for one checkpoint.

    Attributes: ``vocab_size`` (ids lie below it; the model's own vocabulary may be padded further), ``bos_id``
    (or None), ``eos_ids`` (tokens that end an answer, the tokenizer's own first), ``chat_template`` (Jinja
    source, or None).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        chat_template: str | None,
        source: str,
    ):
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self.source = source

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Special tokens written in the text (``<|im_start|>``) become their ids. ``add_special`` puts the BOS and EOS
        around the ids that the checkpoint's tokenizer itself would add. Raises UsageError for text that is not
        valid Unicode (a lone surrogate, which JSON escapes can spell).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = ord(text[error.start])
            raise UsageError(
                f"text is not valid Unicode: lone surrogate U+{bad:04X} at character {error.start}; remove or pair it"
            ) from None
        return self._vocabulary.encode(text, add_special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        ``skip_special`` leaves out special tokens. ``continuation`` says that the ids follow a prompt: then the
        space that some tokenizers put before a text, and drop again here, is real and stays.
        """
        return self._vocabulary.decode([int(i) for i in ids], skip_special, continuation)

    def id_of(self, token: str) -> int | None:
        """Id of a token by its exact text in the vocabulary, or None."""
        return self._vocabulary.id_of(token)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, *, now: datetime | None = None) -> str:
        """Text of a chat (``role`` and ``content`` dictionaries) by the chat template of the checkpoint.

        ``now`` is the time for templates that write a date (default: the clock; pass one value on all ranks).
        Raises UsageError when there is no template, or with the text of the template's own error.
        """
        if self._template is None:
            raise UsageError(
                f"{self.source} has no chat template, so `messages` cannot be used: give the text as `prompt`"
            )
        return self._template.render(messages, add_generation_prompt, now)

    def encode_chat(self, messages: list[dict], *, now: datetime | None = None) -> list[int]:
        """Token ids of a chat, ready for the answer; the template alone decides about a BOS."""
        return self.encode(self.render(messages, now=now), add_special=False)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        if self.chat_template is None:
            return None
        names = {}
        if self.bos_id is not None:
            names["bos_token"] = self._vocabulary.token_of(self.bos_id)
        if self.eos_ids:
            names["eos_token"] = self._vocabulary.token_of(self.eos_ids[0])
        return ChatTemplate(self.chat_template, self.source, {k: v for k, v in names.items() if v is not None})


def load_tokenizer(checkpoint_path: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder (tokenizer.json or tokenizer.model), of a GGUF file or of a store.

    None when the checkpoint has no tokenizer: such a model takes token ids only. Raises CheckpointError for a
    tokenizer that is damaged or of an unsupported kind.
    """
    checkpoint_path = Path(checkpoint_path)
    if checkpoint_path.is_dir():
        from .folder import read_folder

        parts = read_folder(checkpoint_path)
    elif is_store(checkpoint_path):
        from .stored import read_stored

        parts = read_stored(checkpoint_path)
    else:
        from .gguf_vocabulary import read_gguf

        parts = read_gguf(checkpoint_path)
    return None if parts is None else Tokenizer(**parts, source=checkpoint_path.name)
