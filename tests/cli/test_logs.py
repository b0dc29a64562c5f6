"""What a job tells: the launch table, a file of each rank, JSON lines, the heartbeat, and the closing summary."""

import json
import re
from pathlib import Path

import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results

CASE = "llama_odd"
TOOLS = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    ids = [int(i) for i in prompt(CASE)]
    path.write_text("".join(json.dumps({"token_ids": ids[i : i + 5], "max_tokens": 200}) + "\n" for i in range(8)))
    return path


def arguments(model, prompts, output, *options):
    return ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos", *options]


def test_three_ranks(mpirun, model, prompts, tmp_path):
    """The table and its warning, a heartbeat that counts tokens before an answer is finished, a file of each rank."""
    output, logs = tmp_path / "out.h5", tmp_path / "logs"
    # Frequent samples, as of a long job.
    job = mpirun(3, [TOOLS / "short_of_memory.py", "none", *arguments(model, prompts, output, "--grid", "1x1x3"),
                     "--log-dir", logs, "--log-json", "--heartbeat", "0.02"])
    assert job.returncode == 0, job.stderr
    lines = [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in job.stderr.splitlines()]
    table = next(number for number, line in enumerate(lines) if line.split()[:2] == ["ranks", "host"])
    assert lines[table + 1].split()[0] == "0-2" and lines[table + 1].endswith("cpu")
    assert "nothing was retried, lost or resumed" in lines
    beats = [re.match(r"alive: ([\d.]+) tokens/s, (\d+) of 8 prompts; memory: rank ", line) for line in lines]
    beats = [(float(beat[1]), int(beat[2])) for beat in filter(None, beats)]
    assert any(rate > 0 and done == 0 for rate, done in beats), job.stderr
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0000.jsonl", "rank-0001.jsonl", "rank-0002.jsonl"]
    for rank in range(3):
        records = [json.loads(line) for line in (logs / f"rank-{rank:04}.jsonl").read_text().splitlines()]
        messages = [record["message"] for record in records]
        assert messages[0].startswith(f"llama-hpc run: rank {rank} of 3 on ") and {record["rank"] for record in records} == {rank}
        assert f"grid 1x1x3: replica 0, stage 0, tensor rank {rank}" in messages
        assert any("results in" in message for message in messages) == (rank == 0)
    with read_results(output) as results:
        places, incidents = results.provenance["rank_table"], results.provenance["incidents"]
        assert len(places) == 3 and all(place["device"] == "cpu" and place["cpus"] for place in places)
        assert set(incidents.values()) == {0} and {"write_retries", "torn_bytes", "setbacks", "resumed_answers"} <= set(incidents)


def test_an_error_is_in_the_file_of_its_rank_with_the_traceback(mpirun, model, prompts, tmp_path):
    logs = tmp_path / "logs"
    job = mpirun(3, [TOOLS / "failing_rank.py", "bug", 2, *arguments(model, prompts, tmp_path / "out.h5", "--grid", "1x1x3"),
                     "--log-dir", logs], cwd=tmp_path)
    assert job.returncode == 1
    text = (logs / "rank-0002.log").read_text()
    assert "error: internal error on rank 2" in text and "ValueError: an odd value" in text and "Traceback" in text
    assert "Traceback" not in job.stdout + job.stderr + (logs / "rank-0000.log").read_text()


def test_what_was_tried_again_is_told(mpirun, model, prompts, tmp_path):
    """A write that fails once on the last of three leaders."""
    output = tmp_path / "out.h5"
    job = mpirun(3, [TOOLS / "failing_rank.py", "a write", 2, *arguments(model, prompts, output, "--grid", "3x1x1")])
    assert job.returncode == 0, job.stderr
    assert "retried: 1 failed writes of answers" in job.stderr and "rank 2: warning: cannot write" in job.stderr
    with read_results(output) as results:
        assert results.provenance["incidents"]["write_retries"] == 1 and results.num_outputs == 8


def test_one_line_for_a_folder_that_cannot_be_made(command, model, prompts, tmp_path):
    (tmp_path / "file").write_text("")
    job = command(3, arguments(model, prompts, tmp_path / "out.h5", "--log-dir", tmp_path / "file"))
    lines = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert job.returncode == 2 and len(lines) == 1 and "--log-dir" in lines[0] and "cannot write" in lines[0], job.stderr
