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
    needed = answer.request.params.needs_logits(len(answer.tokens))
    return answer.extend(int(np.argmax(logits)), maximum, total, logits if needed else None)


def answered(tokens, decode=decode, **settings):
    """The output after greedy sampling of these tokens; stops at the end of the answer, and checks that there is one."""
    started = time.monotonic()
    answer = Answer(request(**settings), 0, EOS, decode, started)
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
    # A stop string may begin in the first tokens, but not end there.
    ([10, 10, 10], {"stop": ["n"], "min_tokens": 2}, "oneoneo", "stop"),
    ([10, 10], {"stop": ["eo"], "min_tokens": 1}, "on", "stop"),
    ([10, 10, 2], {"stop": ["one"], "min_tokens": 2}, "oneone", "stop"),
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


def drawn(rows, sample=0, **settings):
    """Tokens and log-probabilities of an answer to these rows of logits."""
    answer = Answer(request(**settings, ignore_eos=True), sample, EOS, None, 0.0)
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


@pytest.mark.parametrize("sample", [0, 7])
def test_a_draw_is_fixed_by_seed_id_sample_and_place_in_the_answer(sample):
    """Philox4x64-10 of NumPy is the oracle: key (seed, SHA-256 of the id), counter (sample, index of the token, 0, 0)."""
    rows = random_logits(3, 200)
    tokens, _ = drawn(rows, sample, id="question 17", seed=2**64 - 5, temperature=1.0, n=8)
    key = np.array([2**64 - 5, int.from_bytes(hashlib.sha256(b"question 17").digest()[:8], "little")], np.uint64)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        # NumPy raises its counter before it draws.
        generator = np.random.Philox(key=key, counter=((index << 64) + sample - 1) % 2**256)
        share = int(generator.random_raw()) / 2**64
        order = np.argsort(-row, kind="stable")
        weights = np.exp(row.astype(np.float64) - row.max())[order]
        edges = np.concatenate([[0], np.cumsum(weights / weights.sum())])
        place = int(np.flatnonzero(order == token)[0])
        assert edges[place] - 1e-6 <= share < edges[place + 1] + 1e-6, index


@pytest.mark.parametrize("settings", [
    {"temperature": 0.8}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 1.0, "top_k": 9}, {"temperature": 2, "min_p": 0.2},
    {"repetition_penalty": 1.5}, {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}])
def test_draws_do_not_depend_on_what_else_runs(settings):
    """Not on the place in the file, the other answers in the batch, nor on their order."""
    ids = ["a", "b", "c"]
    rows = {id: random_logits(n, 30) for n, id in enumerate(ids)}
    alone = {id: drawn(rows[id], id=id, seed=1, **settings) for id in ids}
    answers = {id: Answer(request(id, index, seed=1, ignore_eos=True, **settings), 0, EOS, None, 0.0)
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


def plain_adjusted(row, prompt, said, repetition=1.0, frequency=0.0, presence=0.0, bias=()):
    """The definition of penalties and biases in float64, one token at a time."""
    adjusted = row.astype(np.float64)
    for token in range(VOCAB):
        if token in prompt or token in said:
            adjusted[token] = adjusted[token] / repetition if adjusted[token] > 0 else adjusted[token] * repetition
        adjusted[token] -= frequency * said.count(token) + presence * (token in said)
        adjusted[token] += dict(bias).get(token, 0)
    return adjusted


@pytest.mark.parametrize("changes", [
    {"repetition": 1.8}, {"repetition": 0.6}, {"frequency": 1.1}, {"presence": 2.0}, {"presence": -2.0},
    {"bias": {3: 5.5, 9: -100.0, 40: 2.25}}, {"repetition": 1.3, "frequency": 0.7, "presence": -0.4, "bias": {1: 3.0, 59: 4.0}}])
def test_penalties_and_biases_against_their_definition(changes):
    names = {name: f"{name}_penalty" for name in ("repetition", "frequency", "presence")} | {"bias": "logit_bias"}
    prompt = [1, 4, 4, 30]
    settings = SamplingParams(ignore_eos=True, max_tokens=40, **{names[name]: value for name, value in changes.items()})
    answer = Answer(ReadyRequest(0, "a", np.array(prompt, np.int32), settings, 40), 0, EOS, None, 0.0)
    rows, plain = random_logits(6, 40), 0
    for row in rows:
        before = row.copy()
        expected = plain_adjusted(row, prompt, list(answer.tokens), **changes)
        token = extend(answer, row)
        assert token == int(np.argmax(expected)) and (row == before).all()
        plain += token == int(np.argmax(row))
    assert plain < 40, "the settings change nothing"
    wide = rows.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.array(answer.logprobs), logprobs[range(40), answer.tokens], atol=2e-6)


def test_a_repetition_penalty_counts_the_prompt_and_the_others_do_not():
    row = np.zeros(VOCAB, np.float32)
    row[[1, 5]] = 4, 3                  # 1 is the prompt
    for settings, token in (({"repetition_penalty": 2.0}, 5), ({"presence_penalty": 2.0}, 1), ({"frequency_penalty": 2.0}, 1)):
        assert drawn([row], **settings)[0] == [token]
    # Each time counts for frequency, the first for presence.
    assert drawn([row] * 4, frequency_penalty=0.6)[0] == [1, 1, 5, 1]
    assert drawn([row] * 4, presence_penalty=1.5)[0] == [1, 5, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_keeps_end_tokens_away(temperature):
    """Those of the model and of the request, likeliest by far, until there are so many tokens."""
    row = logits_for(2)
    row[14] = 20
    settings = {"min_tokens": 3, "stop_token_ids": [14], "temperature": temperature}
    answer = Answer(request(**settings), 0, EOS | {VOCAB + 5}, None, 0.0)
    tokens = [extend(answer, row) for _ in range(4)]
    assert tokens[3] in (2, 14) and not {2, 14} & set(tokens[:3]) and answer.finish_reason == "stop"
    assert answer.request.params.needs_logits(2) and answer.request.params.needs_logits(3) == bool(temperature)
    # An end token that is ignored is one as any other.
    assert drawn([row] * 2, min_tokens=2)[0] == [2, 2]


def test_the_likeliest_tokens_at_each_one():
    rows = random_logits(7, 12)
    rows[4, [50, 8, 33]] = rows[4].max() + 1
    answer = Answer(request(logprobs=5, temperature=2.0, repetition_penalty=3.0, ignore_eos=True, limit=12), 0, EOS, None, 0.0)
    for row in rows:
        extend(answer, row)
    output = answer.output(0.0)
    assert output.top_tokens.shape == output.top_logprobs.shape == (12, 5)
    assert (output.top_tokens.dtype, output.top_logprobs.dtype) == (np.int32, np.float32)
    assert output.top_tokens[4, :3].tolist() == [8, 33, 50]
    wide = rows.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert output.top_tokens.tolist() == np.argsort(-wide, axis=1, kind="stable")[:, :5].tolist()
    np.testing.assert_allclose(output.top_logprobs, np.sort(logprobs)[:, :-6:-1], atol=2e-6)
    chosen = output.top_tokens == output.tokens[:, None]
    assert (output.top_logprobs[chosen] == np.broadcast_to(output.logprobs[:, None], chosen.shape)[chosen]).all()


def test_without_logprobs_there_are_none():
    assert answered([10, 2]).top_tokens.shape == (2, 0)
