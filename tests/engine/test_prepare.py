"""From requests to token ids: what the model gets, and what it cannot take is refused before a weight is read."""

from dataclasses import replace

import pytest
from model_shapes import SHAPES

from llama_hpc.engine.prepare import longest, outputs_of, prepare
from llama_hpc.engine.requests import Request
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import UsageError

CONFIG = SHAPES["stories260K"]      # 512 tokens of vocabulary and of context


class Letters:
    """A tokenizer: a letter is its code, and 1 stands before every text that has no template."""

    def encode(self, text, *, add_special=True):
        return [1] * add_special + [ord(c) for c in text]

    def render(self, messages):
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)


def request(index=0, prompt=None, messages=None, token_ids=None, **params):
    return Request(index, f"r{index}", prompt, messages, token_ids, SamplingParams(**params))


def prepared(*requests, tokenizer=None, max_seq_len=None):
    return prepare(list(requests), tokenizer, CONFIG, max_seq_len)


def test_the_three_kinds_of_prompts():
    chat = [{"role": "user", "content": "b"}]
    ready, texts = prepared(request(0, "abc"), request(1, messages=chat), request(2, token_ids=[7, 8]), tokenizer=Letters())
    assert [r.prompt.tolist() for r in ready] == [[1, 97, 98, 99], [60, 117, 62, 98], [7, 8]]
    assert texts == ["abc", "<u>b", None]
    assert [(r.index, r.id) for r in ready] == [(0, "r0"), (1, "r1"), (2, "r2")]
    assert all(r.prompt.dtype.name == "int32" for r in ready)


def test_an_answer_ends_where_the_context_does():
    ready, _ = prepared(request(token_ids=[5] * 500, max_tokens=100), request(1, token_ids=[5] * 10, max_tokens=100))
    assert [r.limit for r in ready] == [12, 100]
    ready, _ = prepared(request(token_ids=[5] * 10, max_tokens=100), max_seq_len=64)
    assert ready[0].limit == 54


def test_longest():
    """Of prompt and answer together, which is what the KV cache holds."""
    ready, _ = prepared(request(token_ids=[5] * 20, max_tokens=4), request(1, token_ids=[5] * 3, max_tokens=30))
    assert longest(ready) == 33


def test_logits_are_needed_of_what_answers_may_have():
    several = request(token_ids=[5] * 20, max_tokens=4, n=3, temperature=1.0)
    ready, _ = prepared(several, request(1, token_ids=[5] * 8, max_tokens=100))
    assert outputs_of(ready) == 112 / 140


@pytest.mark.parametrize(("given", "limit", "parts"), [
    (request(token_ids=[5] * 512), None, ("'r0'", "512 tokens", "at most 511")),
    (request(token_ids=[5] * 64), 64, ("'r0'", "64 tokens", "--max-seq-len")),
    (request(token_ids=[5, 512]), None, ("'r0'", "token id 512", "0 to 511")),
    (request(token_ids=[5]), 513, ("--max-seq-len 513", "context of 512")),
    (request(prompt="text"), None, ("'r0'", "no tokenizer", "token_ids")),
    (request(messages=[{"role": "user", "content": "x"}]), None, ("'r0'", "no tokenizer")),
    (request(token_ids=[5], stop="."), None, ("'r0'", "no tokenizer", "stop strings")),
    (request(token_ids=[5], logit_bias={511: 1, 512: 1}), None, ("'r0'", "logit_bias token id 512", "0 to 511")),
    (request(token_ids=[5], min_tokens=1, stop_token_ids=range(512)), None, ("'r0'", "min_tokens is 1", "every token")),
])
def test_refusals(given, limit, parts):
    with pytest.raises(UsageError) as caught:
        prepared(given, max_seq_len=limit)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


def test_more_logprobs_than_tokens():
    small = replace(CONFIG, vocab_size=7)
    with pytest.raises(UsageError, match="'r0': logprobs is 8, but the vocabulary has 7 tokens"):
        prepare([request(token_ids=[5], logprobs=8)], None, small, None)
    assert prepare([request(token_ids=[5], logprobs=7)], None, small, None)


def test_a_context_that_is_just_long_enough():
    ready, _ = prepared(request(token_ids=[5] * 511), max_seq_len=512)
    assert ready[0].limit == 1
