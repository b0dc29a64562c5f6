"""Result files: what they hold, and that they appear whole or not at all."""

import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from llama_hpc.engine.requests import Request
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import LlamaHpcError, ResultsError, UsageError
from llama_hpc.results import Output, check_output_path, patience, read_results, write_results


def request(row, name, **source):
    return Request(row, name, source.get("prompt"), source.get("messages"), source.get("token_ids"), SamplingParams())


def output(row, sample=0, n=3, text="answer", **timing):
    tokens = np.arange(row, row + n, dtype=np.int32)
    return Output(row, sample, tokens, -np.arange(n, dtype=np.float32) / 3, text, "length", timing)


REQUESTS = [request(0, "a", prompt="Once é"), request(1, "b", prompt="x"), request(2, "é", token_ids=[5, 6])]
OUTPUTS = [
    output(2, text="", n=0), output(0, 1, text="z"), output(0, 0, text="a\nb 𝄞", prefill=0.5), output(1, decode=2),
]  # fmt: skip
TEXTS = ["Once é", "x", None]


def test_fixed_names_types_and_input_order(tmp_path):
    path = tmp_path / "out.h5"
    total = write_results(path, REQUESTS, TEXTS, OUTPUTS, {"seed": 0})
    assert os.listdir(tmp_path) == ["out.h5"]
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"format": "llama_hpc results", "version": 1, "status": "complete", "digest": total}
        assert file["requests/id"].asstr()[:].tolist() == ["a", "b", "é"]
        assert file["requests/prompt"].asstr()[:].tolist() == ["Once é", "x", ""]
        assert file["requests/tokens"][:].tolist() == [5, 6] and file["requests/offsets"][:].tolist() == [0, 0, 0, 2]
        out = file["outputs"]
        assert out["request"][:].tolist() == [0, 0, 1, 2] and out["sample"][:].tolist() == [0, 1, 0, 0]
        assert out["offsets"][:].tolist() == [0, 3, 6, 9, 9]
        assert out["tokens"][:].tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 3]
        assert out["text"].asstr()[:].tolist() == ["a\nb 𝄞", "z", "answer", ""]
        assert out["finish_reason"].asstr()[:].tolist() == ["length"] * 4
        types = {"tokens": "<i4", "offsets": "<i8", "logprobs": "<f4", "request": "<i8"}
        assert all(out[name].dtype == np.dtype(kind) for name, kind in types.items())
        assert not np.signbit(out["logprobs"][0])
        np.testing.assert_array_equal(file["timing/prefill"][:], [0.5, np.nan, np.nan, np.nan])
        np.testing.assert_array_equal(file["timing/decode"][:], [np.nan, np.nan, 2, np.nan])
        columns = [*out.values(), *file["requests"].values(), *file["timing"].values()]
        assert all(column.chunks and column.compression == "gzip" for column in columns)


def test_likeliest_tokens_need_a_row_for_each_token(tmp_path):
    top = np.zeros((2, 4), np.int32)
    for tokens, logprobs in ((top, top.astype(np.float32)), (np.zeros((3, 4), np.int32), np.zeros((3, 2), np.float32))):
        wrong = Output(0, 0, np.arange(3), np.zeros(3, np.float32), "", "stop", top_tokens=tokens, top_logprobs=logprobs)
        with pytest.raises(ResultsError, match="request 0 has 3 tokens, but top tokens"):
            write_results(tmp_path / "out.h5", REQUESTS, TEXTS, [wrong], {})


def test_three_lines_of_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    path = tmp_path / "out.h5"
    write_results(path, REQUESTS, TEXTS, OUTPUTS, {})
    with h5py.File(path) as f:
        table = pd.DataFrame({name: f["outputs"][name].asstr()[:] for name in ("text", "finish_reason")})
        table["id"] = f["requests/id"].asstr()[:][f["outputs/request"][:]]
    assert table["id"].tolist() == ["a", "a", "b", "é"] and table["text"][2] == "answer"


def test_many_outputs(tmp_path):
    """Random lengths, several chunks: everything comes back bit for bit."""
    rng = np.random.default_rng(3)
    n = 3000
    requests = [request(i, f"id-{i}", prompt="p") for i in range(n)]
    lengths = rng.integers(0, 90, n)
    outputs = [
        Output(i, 0, rng.integers(0, 50000, k).astype(np.int32), -rng.random(k).astype(np.float32), f"text {i}", "stop")
        for i, k in enumerate(lengths.tolist())
    ]
    path = tmp_path / "big.h5"
    write_results(path, requests, ["p"] * n, outputs[::-1], {})
    with read_results(path) as results:
        assert results.num_tokens == lengths.sum()
        for given, found in zip(outputs, results.outputs(), strict=True):
            assert (found.request, found.text) == (given.request, given.text)
            np.testing.assert_array_equal(found.tokens, given.tokens)
            np.testing.assert_array_equal(found.logprobs.view(np.int32), given.logprobs.view(np.int32))
        results.verify()


def test_no_requests_and_no_outputs(tmp_path):
    write_results(tmp_path / "a.h5", [], [], [], {}, status="incomplete")
    write_results(tmp_path / "b.h5", REQUESTS, TEXTS, [], {}, status="incomplete")
    with read_results(tmp_path / "b.h5") as results:
        assert results.num_outputs == 0 and results.ids == ["a", "b", "é"] and list(results.outputs()) == []
        results.verify()


def test_text_that_hdf5_cannot_hold(tmp_path):
    """NUL and half surrogates become U+FFFD; the file still verifies."""
    outputs = [output(0, text="a\0b\udc80c")]
    write_results(tmp_path / "a.h5", REQUESTS[:1], ["x\0"], outputs, {"note": "\ud800", "list": ["\0"]})
    with read_results(tmp_path / "a.h5") as results:
        assert next(results.outputs()).text == "a\ufffdb\ufffdc" and results.prompts == ["x\ufffd"]
        assert results.provenance == {"note": "\ufffd", "list": ["\ufffd"]}
        results.verify()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((REQUESTS, TEXTS, [output(3)]), "request 3, but there are 3"),
        ((REQUESTS, TEXTS, [output(-1)]), "request -1"),
        ((REQUESTS, TEXTS, [output(1), output(1)]), "two outputs with the sample number 0"),
        ((REQUESTS, TEXTS[:1], []), "prompt texts, got 1"),
        ((REQUESTS, TEXTS, [Output(0, 0, np.zeros(2, np.int32), np.zeros(1, np.float32), "", "")]), "2 tokens and 1"),
    ],
)
def test_contradictions_are_refused(tmp_path, arguments, part):
    with pytest.raises(ResultsError, match=part):
        write_results(tmp_path / "out.h5", *arguments, {})
    assert os.listdir(tmp_path) == []


def test_unknown_status(tmp_path):
    with pytest.raises(ResultsError, match="complete, incomplete, got 'done'"):
        write_results(tmp_path / "out.h5", REQUESTS, TEXTS, [], {}, status="done")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_on_the_way_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    path = tmp_path / "out.h5"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ResultsError if isinstance(error, OSError) else KeyboardInterrupt):
        write_results(path, REQUESTS, TEXTS, OUTPUTS, {}, overwrite=True)
    assert os.listdir(tmp_path) == ["out.h5"] and path.read_text() == "old"


def test_a_disk_that_fails_for_a_while_gets_the_file_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)
    fsync, tries = os.fsync, []

    def fail(descriptor):
        tries.append(descriptor)
        if len(tries) < 4:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    write_results(tmp_path / "out.h5", REQUESTS, TEXTS, OUTPUTS, {})
    assert len(tries) >= 4 and os.listdir(tmp_path) == ["out.h5"]
    with read_results(tmp_path / "out.h5") as results:
        results.verify()


def test_what_does_not_pass_is_not_tried_again(tmp_path, monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResultsError, match="Permission denied"):
        write_results(tmp_path / "out.h5", REQUESTS, TEXTS, OUTPUTS, {})
    assert tries == [1]


def test_results_that_their_disk_does_not_take_go_to_the_second_place(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    (tmp_path / "results").mkdir()
    (tmp_path / "rescue").mkdir()
    (tmp_path / "rescue/out.h5").write_text("of another job")
    replace = os.replace

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResultsError, match=r"No space left on device; they are in .*rescue/out.h5.tmp-") as caught:
        write_results(tmp_path / "results/out.h5", REQUESTS, TEXTS, OUTPUTS, {}, rescue=tmp_path / "rescue")
    monkeypatch.setattr(os, "replace", replace)
    assert (tmp_path / "rescue/out.h5").read_text() == "of another job" and os.listdir(tmp_path / "results") == []
    with read_results(str(caught.value).rpartition(" in ")[2]) as results:
        assert results.verify() and results.num_outputs == len(OUTPUTS)


def test_full_disk(tmp_path):
    """A limit on the file's size stands for a full disk: one error of ours, no crash, no file left."""
    code = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import test_writer as t
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    t.write_results(sys.argv[1], t.REQUESTS, t.TEXTS, t.OUTPUTS, {})
except t.ResultsError as error:
    print(error)
"""
    argv = [sys.executable, "-c", code, tmp_path / "out.h5", os.path.dirname(__file__)]
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=root)
    assert run.returncode == 0, run.stderr
    assert "cannot write the results" in run.stdout and "File too large" in run.stdout
    assert os.listdir(tmp_path) == []


def test_a_file_that_appeared_during_the_run_costs_no_results(tmp_path):
    path = tmp_path / "out.h5"
    path.write_text("someone else's")
    with pytest.raises(UsageError, match="rename that file") as caught:
        write_results(path, REQUESTS, TEXTS, OUTPUTS, {})
    assert path.read_text() == "someone else's"
    (kept,) = set(os.listdir(tmp_path)) - {"out.h5"}
    assert str(tmp_path / kept) in str(caught.value)
    with read_results(tmp_path / kept) as results:
        results.verify()


def test_overwrite_goes_through_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    real = tmp_path / "there" / "real.h5"
    real.write_text("old")
    link = tmp_path / "out.h5"
    link.symlink_to(real)
    write_results(link, REQUESTS, TEXTS, OUTPUTS, {}, overwrite=True)
    assert link.is_symlink() and os.listdir(real.parent) == ["real.h5"]
    read_results(real).close()


def test_check_output_path(tmp_path):
    path = tmp_path / "out.h5"
    check_output_path(path, overwrite=False)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    check_output_path(path, overwrite=True)
    assert path.read_text() == "old"
    with pytest.raises(UsageError, match=r"exists: .*--overwrite"):
        check_output_path(path, overwrite=False)
    with pytest.raises(UsageError, match="is a folder"):
        check_output_path(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="not a regular file"):
        check_output_path("/dev/null", overwrite=True)
    with pytest.raises(ResultsError, match="missing does not exist"):
        check_output_path(tmp_path / "missing" / "out.h5", overwrite=False)
    with pytest.raises(ResultsError, match=r"folder .*out\.h5 is not a folder"):
        check_output_path(path / "out.h5", overwrite=False)
    with pytest.raises(LlamaHpcError, match="name too long"):
        check_output_path(tmp_path / ("x" * 300), overwrite=False)


def test_unwritable_folder(tmp_path):
    """/proc refuses files even to root; a folder without write permission does so to everyone else."""
    with pytest.raises(ResultsError, match="cannot write to the output folder /proc"):
        check_output_path("/proc/out.h5", overwrite=False)
    if os.geteuid():
        tmp_path.chmod(0o555)
        with pytest.raises(ResultsError, match="Permission denied"):
            check_output_path(tmp_path / "out.h5", overwrite=False)
