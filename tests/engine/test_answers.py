"""How an answer ends, what its text is, and that its draws depend on nothing but the request."""

import hashlib
import time

import numpy as np
import pytest

from llama_hpc.engine.answers import Answer, ReadyRequest
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.kernels.cpu.sampling import weigh

VOCAB = 60
EOS = frozenset({2})
WORDS = {2: "</s>", 10: "one", 11: " two", 12: " th", 13: "ree", 14: "!", 15: "ne t"}


def decode(ids):
    """Text of token ids; end tokens are special and leave nothing, as in a tokenizer."""
    return "".join(WORDS.get(i, "") for i in ids if i not in EOS)


def request(id="a", index=0, limit=100, **params):
    return ReadyRequest(index, id, np.array([1], np.int32), SamplingParams(**params), limit)


def logits_for(token):
    logits = np.zeros(VOCAB, np.float32)
    logits[token] = 20
    return logits


def extend(answer, logits):
    """The next token, told as the last stage tells it: the likeliest one, and the row where a draw needs it."""
    maximum, total = weigh(logits, np.empty(logits.shape, np.int64))
    return answer.extend(int(np.argmax(logits)), maximum, total, None if answer.request.params.greedy else logits)


def answered(tokens, decode=decode, **settings):
    """The output after greedy sampling of these tokens; stops at the end of the answer, and checks that there is one."""
    started = time.monotonic()
    answer = Answer(request(**settings), EOS, decode, started)
    for i, token in enumerate(tokens):
        assert answer.finish_reason == ""
        assert extend(answer, logits_for(token)) == token
        if answer.finish_reason:
            assert i == len(tokens) - 1, "ended early"
    assert answer.finish_reason
    return answer.output(started - 1)




@pytest.mark.parametrize(("tokens", "settings", "text", "reason"), [
    ([10, 11, 2], {}, "one two", "stop"),
    ([2], {}, "", "stop"),
    ([10, 2, 11], {"ignore_eos": True, "limit": 3}, "one two", "length"),
    ([10, 11], {"limit": 2}, "one two", "length"),
    ([10, 2], {"limit": 2}, "one", "stop"),
    # A stop token is not part of the text, although it has one.
    ([10, 14], {"stop_token_ids": [14]}, "one", "stop"),
    ([10, 2, 14], {"stop_token_ids": [14], "ignore_eos": True}, "one", "stop"),
    ([10, 2], {"stop_token_ids": [2], "ignore_eos": True}, "one", "stop"),
    # Stop strings: inside a token, over several tokens, the earliest of those that are found.
    ([10, 11], {"stop": ["tw"]}, "one ", "stop"),
    ([10, 12, 13], {"stop": ["three"]}, "one ", "stop"),
    ([10, 12, 13], {"stop": ["e thr"]}, "on", "stop"),
    ([10], {"stop": ["e", "n"]}, "o", "stop"),
    ([14], {"stop": ["!"]}, "", "stop"),
    ([10, 11], {"stop": ["two"], "limit": 2}, "one ", "stop"),
    ([10, 11, 2], {"stop": ["absent"]}, "one two", "stop"),
])
def test_ends(tokens, settings, text, reason):
    output = answered(tokens, **settings)
    assert output.tokens.tolist() == tokens and output.tokens.dtype == np.int32
    assert len(output.logprobs) == len(tokens) and output.logprobs.dtype == np.float32
    assert (output.text, output.finish_reason) == (text, reason)


def test_a_model_without_tokenizer_answers_in_tokens():
    output = answered([10, 11, 2], decode=None, stop_token_ids=[14])
    assert (output.tokens.tolist(), output.text, output.finish_reason) == ([10, 11, 2], "", "stop")


def test_what_an_output_tells():
    output = answered([10, 2], id="x", index=7)
    assert (output.request, output.sample) == (7, 0)
    times = output.timing
    assert 1 <= times["start"] <= times["first_token"] <= times["end"] < 10


def random_logits(seed, count):
    return (np.random.default_rng(seed).standard_normal((count, VOCAB)) * 2).astype(np.float32)


def drawn(rows, **settings):
    """Tokens and log-probabilities of an answer to these rows of logits."""
    answer = Answer(request(**settings, ignore_eos=True), EOS, None, 0.0)
    return [extend(answer, row) for row in rows], [float(p) for p in answer.logprobs]


def test_log_probabilities_are_of_the_raw_logits():
    rows = random_logits(1, 20)
    tokens, logprobs = drawn(rows, temperature=1.7, top_k=5, seed=3)
    wide = rows.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(20), tokens], atol=2e-6)


def test_greedy_takes_the_largest_logit_and_of_equals_the_lowest_id():
    rows = random_logits(2, 20)
    rows[3, [40, 7, 21]] = 9
    tokens, _ = drawn(rows, seed=5)
    assert tokens == np.argmax(rows, axis=1).tolist() and tokens[3] == 7


def test_a_draw_is_fixed_by_seed_id_and_place_in_the_answer():
    """Philox4x64-10 of NumPy is the oracle: key (seed, SHA-256 of the id), counter (0, index of the token, 0, 0)."""
    rows = random_logits(3, 200)
    tokens, _ = drawn(rows, id="question 17", seed=2**64 - 5, temperature=1.0)
    key = np.array([2**64 - 5, int.from_bytes(hashlib.sha256(b"question 17").digest()[:8], "little")], np.uint64)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        # NumPy raises its counter before it draws.
        generator = np.random.Philox(key=key, counter=((index << 64) - 1) % 2**256)
        share = int(generator.random_raw()) / 2**64
        order = np.argsort(-row, kind="stable")
        weights = np.exp(row.astype(np.float64) - row.max())[order]
        edges = np.concatenate([[0], np.cumsum(weights / weights.sum())])
        place = int(np.flatnonzero(order == token)[0])
        assert edges[place] - 1e-6 <= share < edges[place + 1] + 1e-6, index


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 1.0, "top_k": 9}])
def test_draws_do_not_depend_on_what_else_runs(settings):
    """Not on the place in the file, the other answers in the batch, nor on their order."""
    ids = ["a", "b", "c"]
    rows = {id: random_logits(n, 30) for n, id in enumerate(ids)}
    alone = {id: drawn(rows[id], id=id, seed=1, **settings) for id in ids}
    answers = {id: Answer(request(id, index, seed=1, ignore_eos=True, **settings), EOS, None, 0.0)
               for index, id in enumerate(reversed(ids))}
    order = np.random.default_rng(0).permutation(np.repeat(ids, 30)).tolist()
    for id in order:
        answer = answers[id]
        extend(answer, rows[id][len(answer.tokens)])
    for id in ids:
        assert (answers[id].tokens, [float(p) for p in answers[id].logprobs]) == alone[id]


def test_seeds_and_ids_draw_differently():
    rows = random_logits(4, 40)
    draws = [drawn(rows, id=id, seed=seed, temperature=2.0)[0] for id in ("a", "b") for seed in (0, 1, 2**63)]
    assert len({tuple(d) for d in draws}) == len(draws)
    same = [drawn(rows, id="a", seed=seed)[0] for seed in (0, 1)]
    assert same[0] == same[1]
