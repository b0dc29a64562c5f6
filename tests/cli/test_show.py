"""llama-hpc show: what a user sees of a result file, on a terminal, in a pipe and as JSON."""

import argparse
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from llama_hpc.cli import show
from llama_hpc.engine.requests import Request
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results import Output, Score, write_results, write_scores
from llama_hpc.results.parts import ProgressFolder

ROOT = Path(__file__).resolve().parents[2]
PROVENANCE = {
    "model": {"path": "/models/tiny", "hash": "00"},
    "weights": "q8",
    "grid": {"data": 2, "pipeline": 1, "tensor": 3},
    "ranks": 6,
    "start_time": "2026-01-02T03:04:05+00:00",
    "end_time": "2026-01-02T03:04:07+00:00",
}
LONG = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture
def result_file(tmp_path):
    requests = [Request(row, f"q{row}", "p", None, None, SamplingParams()) for row in range(4)]
    logprobs = np.array([-0.25, -np.inf, -2.0], np.float32)
    outputs = [
        Output(0, 0, np.array([7, 8, 9]), logprobs, "Paris.", "stop", {"prefill": 0.0123, "decode": 1.5}),
        Output(1, 0, np.array([7]), logprobs[:1], "def f():\n    return \x1b[31m1\r", "length"),
        Output(2, 0, np.array([], np.int32), logprobs[:0], LONG, "stop"),
        Output(2, 1, np.array([1]), logprobs[:1], "日本語", "stop"),
    ]
    path = tmp_path / "out.h5"
    texts = ["Capital of France?", "Write\ncode", "Tell", "Unanswered"]
    write_results(path, requests, texts, outputs, PROVENANCE, status="incomplete")
    return path


def parse(*argv):
    parser = argparse.ArgumentParser()
    show.add_parser(parser.add_subparsers())
    return parser.parse_args(["show", *map(str, argv)])


def run(capsys, *argv):
    assert show.main(parse(*argv)) == 0
    return capsys.readouterr().out


def command(*argv):
    code = "import sys; from test_show import parse, show; sys.exit(show.main(parse(*sys.argv[1:])))"
    return [sys.executable, "-c", code, *map(str, argv)]


def environment(**extra):
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", **extra}


def test_header_and_answers(capsys, result_file):
    lines = run(capsys, result_file).splitlines()
    assert lines[0] == f"{result_file}: incomplete, 4 prompts, 4 answers, 5 tokens"
    header = dict(line.split(maxsplit=1) for line in lines[1:4])
    assert header == {"model": "/models/tiny", "weights": "q8", "grid": "2x1x3 (6 ranks)"}
    assert "wall time   2.00 s, 2.5 tokens/s" in lines
    place = lines.index("[q0]")
    assert lines[place + 1 : place + 4] == [
        "  prompt: Capital of France?",
        "  answer: Paris.",
        "  3 tokens, finish: stop, prefill 0.0123 s, decode 1.5 s",
    ]
    place = lines.index("[q1]")
    assert lines[place + 1 : place + 7] == [
        "  prompt:", "    Write", "    code", "  answer:", "    def f():", r"        return \x1b[31m1\r",
    ]  # fmt: skip
    assert f"  answer 0: {LONG}" in lines and "  answer 1: 日本語" in lines
    assert lines[-1] == "  no answer in this file"


def test_provenance_may_say_nothing(capsys, tmp_path):
    write_results(tmp_path / "a.h5", [], [], [], {})
    assert len(run(capsys, tmp_path / "a.h5").splitlines()) == 2


def test_wall_seconds_comes_first(capsys, tmp_path):
    write_results(tmp_path / "a.h5", [], [], [], {**PROVENANCE, "wall_seconds": 0.25, "grid": "1x1x1", "model": "m"})
    text = run(capsys, tmp_path / "a.h5")
    assert "0.25 s" in text and "1x1x1 (6 ranks)" in text


def test_selection(capsys, result_file):
    text = run(capsys, result_file, "--limit", 2)
    assert "[q1]" in text and "[q2]" not in text
    text = run(capsys, result_file, "--id", "q2", "--tokens")
    assert "[q0]" not in text and "tokens: 1 (-0.2500)" in text
    with pytest.raises(UsageError, match="nothing with the id 'nope'"):
        show.main(parse(result_file, "--id", "nope"))
    for bad in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit):
            parse(result_file, "--limit", bad)


def test_the_status_as_a_word_for_scripts(capsys, result_file, tmp_path):
    """What decides whether a job has to go on: an exit code of 0 does not tell."""
    assert run(capsys, result_file, "--status") == "incomplete\n"
    write_results(tmp_path / "whole.h5", [], [], [], PROVENANCE)
    assert run(capsys, tmp_path / "whole.h5", "--status") == "complete\n"
    # A job that was killed before it wrote an output, then one that goes on; and what it leaves beside a whole output.
    folder = ProgressFolder(tmp_path / "begun.h5")
    folder.path.mkdir()
    assert run(capsys, folder.output, "--status") == "incomplete\n"
    folder.lock({}, 0)
    assert run(capsys, folder.output, "--status") == "running\n"
    folder.release()
    (tmp_path / "whole.h5.progress").mkdir()
    assert run(capsys, tmp_path / "whole.h5", "--status") == "complete\n"
    with pytest.raises(ResultsError, match="No such file"):
        show.main(parse(tmp_path / "none.h5", "--status"))


def test_verify(capsys, result_file):
    assert "(verified)" in run(capsys, result_file, "--verify")
    with h5py.File(result_file, "r+") as file:
        file["outputs/tokens"][0] = 1
    with pytest.raises(ResultsError, match="altered"):
        show.main(parse(result_file, "--verify"))


def test_json(capsys, result_file):
    document = json.loads(run(capsys, result_file, "--json", "--tokens"), parse_constant=pytest.fail)
    assert document["status"] == "incomplete" and document["grid"] == "2x1x3" and document["provenance"] == PROVENANCE
    first = document["outputs"][0]
    assert first["tokens"] == [7, 8, 9] and first["logprobs"] == [-0.25, None, -2.0]
    assert first["timing"] == {"prefill": 0.0123, "decode": 1.5} and first["prompt"] == "Capital of France?"
    assert [(o["id"], o["sample"]) for o in document["outputs"]] == [("q0", 0), ("q1", 0), ("q2", 0), ("q2", 1)]


def test_likeliest_tokens(capsys, tmp_path):
    top = {"top_tokens": np.array([[7, 5], [9, 8]]), "top_logprobs": np.array([[-0.25, -1.5], [-0.5, -np.inf]])}
    output = Output(0, 0, np.array([7, 8]), np.array([-0.25, -2.0], np.float32), "x", "stop", **top)
    write_results(tmp_path / "a.h5", [Request(0, "q", "p", None, None, SamplingParams())], ["p"], [output], {})
    lines = run(capsys, tmp_path / "a.h5", "--tokens").splitlines()
    assert lines[-3:] == ["  tokens: 7 (-0.2500), 8 (-2.0000)", "  likeliest at token 0: 7 (-0.2500), 5 (-1.5000)",
                          "  likeliest at token 1: 9 (-0.5000), 8 (-inf)"]
    assert "at token" not in run(capsys, tmp_path / "a.h5")
    (entry,) = json.loads(run(capsys, tmp_path / "a.h5", "--json", "--tokens"), parse_constant=pytest.fail)["outputs"]
    assert entry["top_tokens"] == [[7, 5], [9, 8]] and entry["top_logprobs"] == [[-0.25, -1.5], [-0.5, None]]


def test_a_pipe_that_closes_early(result_file):
    process = subprocess.Popen(command(result_file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == b""
    process.stderr.close()


def test_a_narrow_encoding(result_file):
    variables = environment(PYTHONIOENCODING="ascii")
    run = subprocess.run(command(result_file), capture_output=True, env=variables, timeout=60)
    assert run.returncode == 0 and rb"\u65e5" in run.stdout


def test_terminal_width(result_file):
    """On a terminal of 50 columns no line is longer, and no word is lost."""
    main, terminal = pty.openpty()
    with os.fdopen(main, "rb", buffering=0) as reader:
        process = subprocess.Popen(command(result_file, "--id", "q2"), stdout=terminal, env=environment(COLUMNS="50"))
        os.close(terminal)
        data = b""
        while True:
            try:
                piece = reader.read(65536)
            except OSError:
                break
            if not piece:
                break
            data += piece
        assert process.wait(timeout=60) == 0
    lines = data.decode().splitlines()
    assert max(map(len, lines[lines.index("[q2]") :])) <= 50 and data.count(b"quick") == 8


def test_parsing_loads_nothing_heavy():
    code = (
        "import sys, argparse; from llama_hpc.cli import show\n"
        "show.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "sys.exit(bool({'h5py', 'numpy', 'mpi4py'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_scores(capsys, tmp_path):
    documents = [Score("a", np.array([5, 6, 7]), np.array([np.nan, -1, -2], np.float32)),
                 Score("b", np.array([8, 9]), np.array([np.nan, 0], np.float32))]
    write_scores(tmp_path / "s.h5", documents, 8, 4, PROVENANCE)
    lines = run(capsys, tmp_path / "s.h5", "--verify", "--tokens").splitlines()
    assert lines[0] == f"{tmp_path / 's.h5'}: complete, 2 documents, 3 tokens scored"
    assert "perplexity  2.71828 (windows of 8 tokens, one every 4)" in lines and "wall time   2.00 s, 1.5 tokens/s" in lines
    assert lines[-4:] == [
        "[a] 2 tokens scored, log-likelihood -3, perplexity 4.48169", "  tokens: 5, 6 (-1.0000), 7 (-2.0000)",
        "[b] 1 token scored, log-likelihood 0, perplexity 1", "  tokens: 8, 9 (0.0000)",
    ]  # fmt: skip
    document = json.loads(run(capsys, tmp_path / "s.h5", "--json", "--tokens", "--id", "b"), parse_constant=pytest.fail)
    assert (document["documents"], document["window"], document["stride"], document["scored"]) == (2, 8, 4, 3)
    assert document["scores"] == [{"id": "b", "num_tokens": 2, "scored": 1, "log_likelihood": 0, "perplexity": 1,
                                   "tokens": [8, 9], "logprobs": [None, 0]}]
