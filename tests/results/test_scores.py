"""Files of scores: round trips, sums that are exact, and files that were altered or are damaged."""

import math
from fractions import Fraction

import h5py
import numpy as np
import pytest

from llama_hpc.errors import ResultsError
from llama_hpc.results import Score, read_output, read_results, read_scores, write_scores
from llama_hpc.results.scores import Totals


def logprobs(seed, count):
    values = -np.exp(np.random.default_rng(seed).normal(0, 3, count)).astype(np.float32)
    values[0] = np.nan
    return values


@pytest.fixture
def documents():
    return [Score(f"d{n}", np.arange(n, dtype=np.int32), logprobs(n, n)) for n in (2, 50, 3000)]


@pytest.fixture
def path(tmp_path, documents):
    write_scores(tmp_path / "s.h5", documents, 16, 4, {"weights": "q8"})
    return tmp_path / "s.h5"


def test_everything_comes_back(path, documents):
    with read_scores(path) as scores:
        assert (scores.status, scores.window, scores.stride, scores.totals.scored) == ("complete", 16, 4, 3049)
        assert scores.ids == ["d2", "d50", "d3000"] and scores.provenance == {"weights": "q8"}
        for found, given in zip(scores.documents(), documents, strict=True):
            assert found.id == given.id and np.array_equal(found.tokens, given.tokens)
            assert np.array_equal(found.logprobs.view(np.int32), given.logprobs.view(np.int32))
        assert [document.id for document in scores.documents(range(1, 2))] == ["d50"]
        assert scores.verify() == scores.digest
    with h5py.File(path) as file:
        group, attributes = file["documents"], file.attrs
        assert group["scored"][:].tolist() == [1, 49, 2999]
        assert group["perplexity"][1] == pytest.approx(math.exp(-np.nanmean(documents[1].logprobs.astype(float))))
        assert attributes["log_likelihood"] == pytest.approx(group["log_likelihood"][:].sum())
        assert attributes["perplexity"] == pytest.approx(math.exp(-attributes["log_likelihood"] / 3049))
    with read_output(path) as scores:
        assert scores.window == 16


def test_sums_are_rounded_once_and_perplexities_correctly():
    values = logprobs(9, 5000)
    exact = sum(map(Fraction, values[1:].tolist()))
    for order in (values, values[::-1], np.random.default_rng(1).permutation(values)):
        assert Totals.of(order) == Totals(4999, float(exact))
    assert Totals(3, -3.0).perplexity == 2.718281828459045 and Totals(2, 0.0).perplexity == 1
    assert Totals(1, -1e9).perplexity == math.inf and math.isnan(Totals.of(values[:1]).perplexity)


@pytest.mark.parametrize(("name", "value"), [("tokens", 7), ("logprobs", -0.5), ("id", "x")])
def test_verify_finds_an_altered_value(path, name, value):
    with h5py.File(path, "r+") as file:
        file["documents"][name][-1] = value
    with read_scores(path) as scores, pytest.raises(ResultsError, match="altered"):
        scores.verify()


def test_damaged_or_of_another_kind(path):
    with pytest.raises(ResultsError, match="no result file of llama_hpc"):
        read_results(path)
    with h5py.File(path, "r+") as file:
        file["documents/logprobs"].resize((7,))
    for read in (read_scores, read_output):
        with pytest.raises(ResultsError, match="contradict"):
            read(path)
    with h5py.File(path, "r+") as file:
        del file["documents/offsets"]
    with pytest.raises(ResultsError, match="damaged"):
        read_scores(path)
