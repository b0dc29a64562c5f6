"""llama-hpc score: against transformers, against run, on every kind of grid, and what it says of bad input."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from damaged_models import Models
from reference_models import stories_folder, write_checkpoint, write_random_llama

from llama_hpc.results import read_results, read_scores

REFERENCE = Path(__file__).parents[1] / "data" / "score_reference.npz"
CASES = ("llama_odd", "mistral_window", "smollm", "stories260K", "stories15M")
WINDOWS = ("32/32", "32/12", "24/1", "64/32")
RANDOM = {"hidden": 72, "ffn": 100, "layers": 3, "heads": 9, "kv_heads": 3, "vocab": 515, "seed": 11}
GRIDS = ("1x1x1", "1x1x3", "1x2x1", "2x1x1", "1x2x2")


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def score(command, tmp_path):
    """A function that scores with each of some sets of options and returns ``read`` of the files."""
    def run(model, texts, options, ranks=1, name="score", read=read_scores):
        if isinstance(texts, list):
            texts = write_lines(tmp_path / "texts.jsonl", texts)
        outputs = [tmp_path / f"{name}-{ranks}-{i}.h5" for i in range(len(options))]
        given = {"score": "--texts", "run": "--prompts"}[name]
        for output, own in zip(outputs, options, strict=True):
            job = command(ranks, [name, model, given, texts, "--output", output, "--overwrite", *own.split()])
            assert job.returncode == 0, job.stderr
        return [read(output) for output in outputs]
    return run


def logprobs_of(scores):
    return [document.logprobs for document in scores.documents()]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_transformers(score, tmp_path, name):
    reference = np.load(REFERENCE)
    model = stories_folder(name) if name.startswith("stories") else write_checkpoint(name, tmp_path / "model")
    if model is None:
        pytest.skip("LLAMA_HPC_TEST_DATA has no such model")
    texts = [{"token_ids": reference[f"{name}/ids"].tolist()}]
    if name == "stories15M":
        # Its tokenizer puts a token for the beginning before a text.
        texts = tmp_path / "text.txt"
        texts.write_text(str(reference["text"]))
    options = ["--weights f32 --window {} --stride {}".format(*windows.split("/")) for windows in WINDOWS]
    for windows, scores in zip(WINDOWS, score(model, texts, options), strict=True):
        expected = reference[f"{name}/{windows}"]
        (document,) = scores.documents()
        assert document.tokens.tolist() == reference[f"{name}/ids"].tolist()
        assert np.array_equal(np.isnan(document.logprobs), np.isnan(expected))
        np.testing.assert_allclose(document.logprobs, expected, rtol=1e-3, atol=1e-4)
        totals = scores.totals
        assert totals.log_likelihood / totals.scored == pytest.approx(np.nanmean(expected), rel=1e-4)
        assert totals.perplexity == pytest.approx(np.exp(-np.nanmean(expected)), rel=1e-3)
        assert (scores.window, scores.stride) == tuple(map(int, windows.split("/")))
        scores.verify()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_llama(tmp_path_factory.mktemp("model") / "random", **RANDOM)


@pytest.fixture(scope="module")
def texts():
    """Of every length around a window of 40, and one of many windows."""
    rng = np.random.default_rng(1)
    return [{"id": f"t{n}", "token_ids": rng.integers(0, RANDOM["vocab"], n).tolist()} for n in (2, 39, 40, 41, 300, 3, 79, 80)]


@pytest.mark.parametrize("weights", ["f32", "q8"])
def test_every_layout_gives_the_same_bits(score, model, texts, weights):
    common = f"--weights {weights} --window 40 --stride 30"
    (expected,) = score(model, texts, [common])
    found = score(model, texts, [f"{common} --token-budget {budget}" for budget in (1, 7, 40, 100)] + [f"{common} --threads 2"])
    for grid in GRIDS[1:]:
        ranks = int(np.prod(list(map(int, grid.split("x")))))
        found += score(model, texts, [f"{common} --grid {grid} --token-budget {budget}" for budget in (16, 512)], ranks)
        table = found[-1].provenance["rank_table"]
        assert len(table) == ranks and all((rank["reductions"] > 0) == (grid[-1] != "1") for rank in table)
        # 19 windows of up to 40 tokens: each replica has some.
        leaders = [rank["windows"] for rank in table if (rank["stage"], rank["tensor"]) == (int(grid[2]) - 1, 0)]
        assert sum(leaders) == sum(rank["windows"] for rank in table) and all(leaders)
    assert {scores.verify() for scores in found} == {expected.digest}
    assert {scores.totals for scores in found} == {expected.totals}
    assert expected.ids == [text["id"] for text in texts]


def test_an_int8_cache(score, model, texts):
    """Other scores, but hardly; the same on every layout."""
    common = "--window 40 --kv-cache q8"
    half, expected, *found = score(model, texts, ["--window 40", common, f"{common} --token-budget 7"])
    found += score(model, texts, [f"{common} --grid 1x1x3"], ranks=3)
    assert {scores.verify() for scores in found} == {expected.digest} != {half.digest}
    assert {scores.totals for scores in found} == {expected.totals}
    assert expected.totals.perplexity == pytest.approx(half.totals.perplexity, rel=1e-2)
    assert [scores.provenance["kv_cache"] for scores in (half, expected)] == ["f16", "q8"]


def test_a_stride_of_a_window_is_each_piece_alone(score, model, texts):
    (whole,) = score(model, texts, ["--window 40 --stride 40"])
    bounds = [[*range(0, len(text["token_ids"]), 40), len(text["token_ids"])] for text in texts]
    pieces = [text["token_ids"][start:stop] for text, edges in zip(texts, bounds, strict=True) for start, stop in pairwise(edges)]
    (alone,) = score(model, [{"token_ids": piece} for piece in pieces if len(piece) > 1], ["--window 40"])
    assert whole.totals == alone.totals
    # A piece of one token has no likelihood.
    filled = iter(logprobs_of(alone))
    joined = [next(filled) if len(piece) > 1 else np.array([np.nan], np.float32) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate(logprobs_of(whole)), np.concatenate(joined))


def test_a_window_scores_what_follows_more_context_than_a_stride_leaves(score, model, texts):
    """Each token as if the window that scores it were a document that ends with it."""
    (strided,) = score(model, texts, ["--window 40 --stride 9"])
    long = next(text["token_ids"] for text in texts if len(text["token_ids"]) == 300)
    # The fourth window has tokens 27 to 66 and scores the last nine.
    (window,) = score(model, [{"token_ids": long[27:67]}], ["--window 40"])
    own = logprobs_of(strided)[4]
    assert np.array_equal(own[58:67], logprobs_of(window)[0][-9:])
    assert np.isnan(own).tolist() == [True] + [False] * 299


def test_likelihoods_of_an_answer_are_those_that_run_tells(score, model, texts):
    prompts = [{"token_ids": text["token_ids"][:30]} for text in texts]
    (answers,) = score(model, prompts, ["--max-tokens 20 --ignore-eos"], name="run", read=read_results)
    outputs = list(answers.outputs())
    whole = [{"token_ids": [*p["token_ids"], *o.tokens.tolist()]} for p, o in zip(prompts, outputs, strict=True)]
    (scores,) = score(model, whole, ["--window 2048"])
    for logprobs, output in zip(logprobs_of(scores), outputs, strict=True):
        assert np.array_equal(logprobs[-len(output.tokens) :], output.logprobs)


def test_scores_can_be_scored_again(score, model, texts):
    (scores,) = score(model, texts, ["--window 40"])
    (again,) = score(model, scores.path, ["--window 40"], ranks=2)
    assert again.digest == scores.digest and again.ids == scores.ids


# What is wrong, the exit code, what the line says, then the model, the texts and the options.
GOOD = '{"id": "a", "token_ids": [1, 2, 3]}\n'
BAD = {
    "missing file": (2, "cannot read nowhere.jsonl: No such file", "small", GOOD, "--texts nowhere.jsonl"),
    "unknown kind of file": (2, "the name of a texts file must end in .jsonl", "small", GOOD, "--texts texts.csv"),
    "empty document": (2, "texts.jsonl, line 2: the text is empty", "small", GOOD + '{"text": ""}\n', ""),
    "no tokens": (2, "line 2: token_ids must be a list of at least one", "small", GOOD + '{"token_ids": []}\n', ""),
    "one token": (2, "document 'b': 1 token, but", "small", GOOD + '{"id": "b", "token_ids": [7]}\n', ""),
    "one word": (2, "document '0': 1 token, but", "text", '{"text": "hello"}\n', ""),
    "token id outside": (2, "document '1': token id 320 at position 1", "small", GOOD + '{"token_ids": [1, 320]}\n', ""),
    "no tokenizer": (2, "document '0': the model has no tokenizer, so give token_ids", "small", '{"text": "hello"}\n', ""),
    "window beyond the context": (2, "--window 257 is longer than the model's context of 256", "small", GOOD, "--window 257"),
    "window of one": (2, "--window: must be a whole number of at least 2", "small", GOOD, "--window 1"),
    "stride beyond the window": (2, "--stride 9 is longer than the window of 8", "small", GOOD, "--window 8 --stride 9"),
    "stride of nothing": (2, "--stride: must be a whole number of at least 1", "small", GOOD, "--stride 0"),
    "dynamic RoPE": (2, "--window of score", "two_layers_dynamic", GOOD, "--window 200"),
    "output exists": (2, "texts.jsonl exists: give another name or --overwrite", "small", GOOD, "--output texts.jsonl"),
    "NaN": (1, "NaN or infinity", "nan_embedding", '{"token_ids": [63, 63]}\n', "--grid 1x{n}x1"),
    "out of range": (1, "range of exact sums", "large", '{"token_ids": [1, 2, 3, 4]}\n', "--grid 1x1x{n}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(command, damaged, tmp_path, name, n):
    code, text, model, texts, options = BAD[name]
    (tmp_path / "texts.jsonl").write_text(texts)
    arguments = ["score", damaged[model], "--texts", "texts.jsonl", "--output", "out.h5", *options.replace("{n}", str(n)).split()]
    job = command(n, arguments, cwd=tmp_path)
    (line,) = (line for line in (job.stdout + "\n" + job.stderr).splitlines() if "llama-hpc:" in line)
    assert line.startswith("llama-hpc: error: ") and text in line
    assert job.returncode == code
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"texts.jsonl": texts}
