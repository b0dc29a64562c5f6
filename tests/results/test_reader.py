"""Reading result files: round trips, verification, and files that are damaged or not ours."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from llama_hpc.engine.requests import Request
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import ResultsError
from llama_hpc.results import Output, read_results, write_results


def output(row, sample):
    tokens = np.arange(row, dtype=np.int32)
    return Output(row, sample, tokens, -np.ones(row, np.float32), f"{row}/{sample}", "stop", {"decode": row})


@pytest.fixture
def result_file(tmp_path):
    requests = [Request(row, f"id{row}", "p", None, None, SamplingParams()) for row in range(4)]
    outputs = [output(row, sample) for row in (0, 1, 3) for sample in (0, 1)]
    path = tmp_path / "out.h5"
    write_results(path, requests, ["p"] * 4, outputs, {"weights": "q8", "grid": {"data": 2}}, status="incomplete")
    return path


def fails(path, *parts):
    with pytest.raises(ResultsError) as caught:
        read_results(path).verify()
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


def test_everything_comes_back(result_file):
    with read_results(result_file) as results:
        assert (results.status, results.num_outputs, results.num_tokens) == ("incomplete", 6, 8)
        assert results.provenance == {"weights": "q8", "grid": {"data": 2}}
        assert results.verify() == results.digest
        assert [output.text for output in results.outputs(1, 4)] == ["0/1", "1/0", "1/1"]
        assert [output.text for output in results.outputs_of(3)] == ["3/0", "3/1"] and results.outputs_of(2) == []
        last = results.outputs_of(3)[1]
        assert last.tokens.tolist() == [0, 1, 2] and last.logprobs.tolist() == [-1, -1, -1]
        assert last.timing == {"decode": 3.0} and last.finish_reason == "stop"
    assert results.ids == ["id0", "id1", "id2", "id3"]


@pytest.fixture
def with_top(tmp_path):
    """Three outputs, with 2, none and 3 likeliest tokens each."""
    requests = [Request(row, f"id{row}", "p", None, None, SamplingParams()) for row in range(4)]
    outputs = []
    for row, count in ((1, 2), (2, 0), (3, 3)):
        top = np.arange(row * count, dtype=np.int32).reshape(row, count) + 10 * row
        outputs.append(replace(output(row, 0), top_tokens=top, top_logprobs=-top.astype(np.float32)))
    path = tmp_path / "top.h5"
    write_results(path, requests, ["p"] * 4, outputs, {})
    return path


def test_the_likeliest_tokens_come_back(with_top, result_file):
    with read_results(with_top) as results:
        one, none, three = results.outputs()
        assert one.top_tokens.tolist() == [[10, 11]] and one.top_logprobs.tolist() == [[-10, -11]]
        assert three.top_tokens.tolist() == [[30, 31, 32], [33, 34, 35], [36, 37, 38]] and none.top_tokens.shape == (2, 0)
        assert results.outputs_of(3)[0].top_logprobs.tolist() == (-three.top_tokens).tolist()
        assert results.top_offsets.tolist() == [0, 2, 2, 11]
        results.verify()
    with h5py.File(with_top) as file, h5py.File(result_file) as other:
        assert file["outputs/top_tokens"].dtype == np.int32 and file["outputs/top_logprobs"].dtype == np.float32
        assert "top_tokens" not in other["outputs"]


@pytest.mark.parametrize("name", ["top_tokens", "top_logprobs", "top_offsets"])
def test_a_part_of_the_likeliest_tokens_is_damaged(with_top, name):
    with h5py.File(with_top, "r+") as file:
        file["outputs"][name].resize((3,))
    fails(with_top, "contradict each other")
    with h5py.File(with_top, "r+") as file:
        del file["outputs"][name]
    fails(with_top, "contradict each other")


def test_likeliest_tokens_that_do_not_fit_their_output(with_top):
    with h5py.File(with_top, "r+") as file:
        file["outputs/top_offsets"][:] = [0, 2, 3, 11]
    fails(with_top, "contradict each other")


@pytest.mark.parametrize(("name", "value"), [("tokens", 7), ("logprobs", -0.5), ("sample", 5)])
def test_verify_finds_an_altered_value(result_file, name, value):
    with h5py.File(result_file, "r+") as file:
        file["outputs"][name][-1] = value
    fails(result_file, "it was altered")


def test_not_ours(tmp_path):
    fails(tmp_path / "none.h5", "No such file")
    fails(tmp_path, "Is a directory")
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    fails(text, "not an HDF5 file")
    text.write_text("")
    fails(text, "not an HDF5 file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    fails(tmp_path / "other.h5", "no result file of llama_hpc")


def test_a_newer_version(result_file):
    with h5py.File(result_file, "r+") as file:
        file.attrs["version"] = 2
    fails(result_file, "version 2", "up to 1", "update")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_truncated(result_file, fraction):
    data = result_file.read_bytes()
    result_file.write_bytes(data[: int(len(data) * fraction)])
    fails(result_file, "truncated or damaged")


@pytest.mark.parametrize(
    "name", ["requests/id", "requests/prompt", "outputs/tokens", "outputs/offsets", "outputs/text", "timing", "outputs"]
)
def test_a_missing_part(result_file, name):
    with h5py.File(result_file, "r+") as file:
        del file[name]
    fails(result_file, "damaged")


def test_sizes_that_contradict_each_other(result_file):
    with h5py.File(result_file, "r+") as file:
        file["outputs/logprobs"].resize((3,))
    fails(result_file, "sizes of its datasets contradict")


@pytest.mark.parametrize(
    ("name", "row", "value"), [("offsets", 3, 100), ("request", 0, -1), ("request", 5, 4), ("request", 1, 3)]
)
def test_indices_out_of_range(result_file, name, row, value):
    with h5py.File(result_file, "r+") as file:
        file["outputs"][name][row] = value
    fails(result_file, "contradict")


@pytest.mark.parametrize(("name", "value"), [("status", "finished"), ("digest", 5)])
def test_bad_attributes(result_file, name, value):
    with h5py.File(result_file, "r+") as file:
        file.attrs[name] = value
    fails(result_file, "no valid status and digest")
