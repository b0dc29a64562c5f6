"""Vocabularies of the ``sentencepiece`` package: tokenizer.model, and the same model rebuilt from a GGUF file.

Message and field numbers: sentencepiece_model.proto of https://github.com/google/sentencepiece.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sentencepiece

SPACE = "\u2581"

# sentencepiece_model.proto: ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the model sees it; ``special`` ones are not shown in decoded text.

    ``lstrip`` and ``rstrip``: the token also takes the white space before or after it.
    """

    content: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False

    @property
    def pattern(self) -> str:
        before, after = r"\s*" * self.lstrip, r"\s*" * self.rstrip
        return f"{before}({re.escape(self.content)}){after}"


class SentencePieceVocabulary:
    """Encode and decode with a sentencepiece model.

    ``model``: serialized ModelProto. ``added``: tokens matched in the text, those of the model (control, unknown)
    included. ``prefix`` and ``suffix``: ids put around a text on request (BOS, EOS). ``space_after_added``: the
    text after an added token starts with the model's dummy space, as the start of the whole text does.
    Raises RuntimeError (from sentencepiece) when the model is not valid.
    """

    def __init__(
        self,
        model: bytes,
        added: Iterable[AddedToken] = (),
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        space_after_added: bool = True,
    ):
        self._start = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Serialized messages that are concatenated merge, and the last value of a field wins.
        plain = model + _message(3, _varint(3, 0)) if not space_after_added else model
        self._middle = sentencepiece.SentencePieceProcessor(model_proto=plain)
        self._strips_space = self._start.normalize("x").startswith(SPACE)
        self._prefix = list(prefix)
        self._suffix = list(suffix)

        tokens = {token.content: token for token in [*special_pieces(self._start), *added] if token.content}.values()
        self._added = {token.id: token for token in tokens}
        self._ids = {token.content: token.id for token in tokens}
        self.size = max([self._start.vocab_size(), *(i + 1 for i in self._added)])
        longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
        self._split = re.compile("|".join(t.pattern for t in longest_first) or "(?!)")

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text):
            ids += part
        return self._prefix + ids + self._suffix if add_special else ids

    def _parts(self, text: str) -> Iterator[list[int]]:
        end = 0
        for match in self._split.finditer(text):
            yield self._encode_plain(text[end : match.start()], end == 0)
            yield [self._ids[match[match.lastindex]]]
            end = match.end()
        yield self._encode_plain(text[end:], end == 0)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        return (self._start if at_start else self._middle).encode(text) if text else []

    def decode(self, ids: Sequence[int], skip_special: bool, continuation: bool) -> str:
        data = b"".join(self._bytes_of(i, skip_special) for i in ids)
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._strips_space and not continuation else text

    def _bytes_of(self, token_id: int, skip_special: bool) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special and skip_special else added.content.encode()
        if not 0 <= token_id < self._start.vocab_size():
            return b""
        piece = self._start.id_to_piece(token_id)
        if self._start.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        token_id = self._start.piece_to_id(token)
        # Unknown pieces map to the id of <unk>, which is among the added tokens.
        return None if token_id in self._added else token_id

    def token_of(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        return self._start.id_to_piece(token_id) if 0 <= token_id < self._start.vocab_size() else None


def special_pieces(model: sentencepiece.SentencePieceProcessor) -> list[AddedToken]:
    """The control and unknown pieces of a model (``<s>``, ``</s>``, ``<unk>``)."""
    ids = (i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i))
    return [AddedToken(model.id_to_piece(i), i, special=True) for i in ids]


def special_ids(model: bytes) -> tuple[list[int], list[int]]:
    """The BOS and the EOS id that a serialized model names, each as a list of one or none."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    bos, eos = processor.bos_id(), processor.eos_id()
    return [bos] * (bos >= 0), [eos] * (eos >= 0)


def build_model(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], add_dummy_prefix: bool) -> bytes:
    """A serialized ModelProto of BPE type with identity normalisation that keeps every space.

    ``types``: the constants of this module; exactly one piece must be UNKNOWN. Byte fallback is on when all 256
    byte pieces ``<0x00>`` … ``<0xFF>`` are there; otherwise byte pieces count as normal ones.
    """
    byte_fallback = sum(kind == BYTE for kind in types) == 256
    model = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        kind = NORMAL if kind == BYTE and not byte_fallback else kind
        model += _message(1, _message(1, piece.encode()) + _float(2, score) + _varint(3, kind))
    unknown = list(types).index(UNKNOWN)
    bpe = 2
    trainer = _varint(3, bpe) + _varint(4, len(pieces)) + _varint(35, byte_fallback) + _varint(40, unknown)
    normalizer = _message(1, b"identity") + _varint(3, add_dummy_prefix) + _varint(4, 0) + _varint(5, 1)
    return bytes(model) + _message(2, trainer) + _message(3, normalizer)


# The protobuf wire format (https://protobuf.dev/programming-guides/encoding), as far as a ModelProto needs it.
def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(int(value))


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(content)) + content
