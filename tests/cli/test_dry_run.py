"""llama-hpc run --dry-run: what a run would check, need and do, without reading weights or leaving anything behind."""

import json
import re

import pytest
from damaged_models import Models
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results
from llama_hpc.results.parts import VERSION, ProgressFolder
from llama_hpc.results.records import framed, output_record
from llama_hpc.runtime.tables import size

CASE = "llama_odd"              # 4 layers, 8 heads, 4 KV heads, context 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(tmp_path):
    """A folder with prompts."""
    ids = [int(i) for i in prompt(CASE)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": ids[: 3 + i], "max_tokens": 8 * (i + 1)}) + "\n"
                                                    for i in range(6)))
    return tmp_path


def arguments(model, *options):
    return ["run", str(model), "--prompts", "prompts.jsonl", "--output", "out.h5", *map(str, options)]


def parsed(text):
    """The facts by name, the line about the grid, the rows of the table by title, and what follows."""
    lines = text.splitlines()
    grid = next(number for number, line in enumerate(lines) if line.startswith("grid "))
    facts = {line[:20].strip(): line[20:] for line in lines[:grid] if line}
    titles = re.split(r"  +", lines[grid + 2].strip())
    end = lines.index("", grid + 2)
    rows = [dict(zip(titles, re.split(r"  +", line.strip()), strict=True)) for line in lines[grid + 3 : end]]
    return facts, lines[grid], rows, lines[end:]


@pytest.fixture
def dry_run(command, folder):
    """The function that tries a run with some options on one rank, and returns what ``parsed`` finds."""
    def run(model, *options):
        job = command(1, arguments(model, "--dry-run", *options), cwd=folder)
        assert job.returncode == 0, job.stderr
        return parsed(job.stdout)
    return run


def test_any_number_of_ranks_on_a_login_node(dry_run, folder, model):
    facts, grid, rows, rest = dry_run(model, "--ranks", 6, "--grid", "2x3x1", "--memory", "1G", "--max-seqs", 4)
    assert facts["prompts"] == "prompts.jsonl: 6 prompts of 3 to 8 tokens, 6 answers of up to 48"
    assert facts["output"] == "out.h5 can be written" and facts["progress"] == "nothing to go on with: the job begins"
    assert facts["layers"] == "4" and facts["sequences"].startswith("3 at a time in a replica, of up to 56 tokens")
    assert facts["steps"].startswith("5 under way at a time, each of up to 168 tokens, 168 of prompts")
    assert facts["KV cache"] == "f16, 12 pages of 16 tokens in a replica"
    assert grid.startswith(f"grid 2x3x1 (replicas x stages x tensor ranks), a rank may use {size(0.85 * 2**30)} of 1.00 GiB")
    assert [row["stage"] for row in rows] == ["0", "1", "2"] and [row["layers"] for row in rows] == ["0-0", "1-2", "3-3"]
    assert "6 ranks are assumed; under mpirun or srun a dry run also checks where they are, and their GPUs" in rest
    # Without a grid, memory decides; with a grid alone, it tells the ranks.
    assert dry_run(model, "--ranks", 5, "--memory", "1G")[1].startswith("grid 5x1x1")
    assert len(dry_run(model, "--grid", "3x1x4")[2]) == 4
    assert [path.name for path in folder.iterdir()] == ["prompts.jsonl"], "nothing is left behind"


def test_it_tells_what_the_run_then_does(command, folder, model):
    """On three ranks: the same grid, cache and weights, and where the ranks are."""
    options = ["--grid", "1x1x3", "--max-seqs", 4, "--token-budget", 64]
    job = command(3, arguments(model, *options, "--dry-run"), cwd=folder)
    assert job.returncode == 0, job.stderr
    facts, grid, rows, rest = parsed(job.stdout)
    table = next(number for number, line in enumerate(rest) if line.startswith("ranks  host"))
    assert rest[table + 1].split()[0] == "0-2"
    run = command(3, arguments(model, *options), cwd=folder)
    assert run.returncode == 0, run.stderr
    assert f"{grid.split(',')[0]}: 3 ranks on 1 host" in run.stderr and rest[table + 1] in run.stderr
    warnings = [line.removeprefix("warning: ") for line in rest if line.startswith("warning: ")]
    assert all(f"warning: {line}" in run.stderr for line in warnings)
    with read_results(folder / "out.h5") as results:
        places = results.provenance["rank_table"]
        assert {place["pages"] for place in places} == {int(re.search(r"(\d+) pages", facts["KV cache"])[1])}
        assert [size(place["cache_bytes"]) for place in places] == [row["KV cache"] for row in rows]
        # But for norms.
        assert all(0 <= place["weight_bytes"] - held < 20000 for place, held in zip(places, map(_bytes, rows), strict=True))


def _bytes(row):
    number, unit = row["weights"].split()
    return float(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit] - 5000


def test_no_weight_is_read(command, dry_run, folder):
    """A model that no run can load."""
    model = Models(folder / "models")["nan_row_parallel"]
    (folder / "prompts.jsonl").write_text('{"token_ids": [1, 2, 3]}\n')
    assert dry_run(model)[0]["model"] == str(model)
    job = command(1, arguments(model), cwd=folder)
    assert job.returncode == 1 and "NaN" in job.stderr


def test_what_a_resumed_job_would_find(command, dry_run, folder, model):
    """And nothing of it is touched."""
    assert command(1, arguments(model), cwd=folder).returncode == 0
    with read_results(folder / "out.h5") as results:
        header = {"version": VERSION, "identity": results.provenance["identity"], "replica": 0, "grid": "1x1x1"}
        records = [framed(header), *map(output_record, results.outputs(0, 2)), b"\x99\0\0\0half"]
    (folder / "out.h5").rename(folder / "whole.h5")
    progress = ProgressFolder(folder / "out.h5")
    progress.path.mkdir()
    progress.part(0, 0).write_bytes(b"".join(records))
    assert dry_run(model, "--resume")[0]["progress"] == \
        "2 of 6 answers are there, of 1 runs, 8 bytes of half written ones are cut off: the job goes on"
    assert dry_run(model, "--overwrite")[0]["progress"].startswith("that of an unfinished run is given up")
    assert [path.name for path in progress.path.iterdir()] == ["part-0-0.log"]
    assert progress.part(0, 0).read_bytes() == b"".join(records)
    progress.lock({"process": 7}, 0)
    job = command(1, arguments(model, "--dry-run", "--resume"), cwd=folder)
    assert job.returncode == 1 and "out.h5 is being written by process 7: wait for its end" in job.stderr
    progress.release()
    (folder / "whole.h5").rename(folder / "out.h5")
    job = command(1, arguments(model, "--dry-run", "--resume"), cwd=folder)
    assert "complete: nothing is left to do" in job.stdout and "out.h5 is complete already: 6 answers" in job.stderr
    assert dry_run(model, "--overwrite")[0]["output"] == "out.h5 can be written, which is replaced"


REFUSED = {
    "no prompts": ["--prompts", "nowhere.jsonl"],
    "no model": ["--weights", "f32", "--max-seq-len", "300"],
    "output exists": ["--output", "prompts.jsonl"],
    "missing folder": ["--output", "nowhere/out.h5"],
    "grid": ["--grid", "1x0x1"],
    "context": ["--context-parallel", "2"],
    "a cache for nobody": ["--kv-memory", "1K"],
    "rescue": ["--rescue", "nowhere"],
    "targets": ["--slo", "ttft.p99=1"],
    "unfinished": ["--output", "begun.h5"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_those_of_the_run(command, folder, model, case):
    """The same line and the same exit code."""
    begun = ProgressFolder(folder / "begun.h5")
    begun.path.mkdir()
    begun.part(0, 0).write_bytes(framed({}) + framed({}))
    said = []
    for dry in (["--dry-run"], []):
        job = command(1, arguments(model, *REFUSED[case], *dry), cwd=folder)
        said.append((job.returncode, job.stderr.splitlines()[-1]))
    assert said[0] == said[1] and said[0][0] in (1, 2) and said[0][1].startswith("llama-hpc: error: ")


@pytest.mark.parametrize(("ranks", "options", "text"), [
    (1, ["--ranks", 4], "--ranks and --memory say what a --dry-run is about"),
    (1, ["--dry-run", "--ranks", 4, "--grid", "1x1x3"], "grid 1x1x3 needs 1 x 1 x 3 = 3 ranks, but the job has 4"),
    (3, ["--dry-run", "--ranks", 4], "--ranks 4: 3 ranks were started"),
    (3, ["--dry-run", "--grid", "1x1x2"], "grid 1x1x2 needs 1 x 1 x 2 = 2 ranks, but the job has 3"),
    (1, ["--dry-run", "--ranks", 2, "--memory", "300M"], "the model and its cache need 0.0 GiB on a rank even on grid"),
])
def test_what_cannot_be_tried(command, folder, model, ranks, options, text):
    job = command(ranks, arguments(model, *options), cwd=folder)
    lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: ")]
    assert job.returncode == 2 and len(lines) == 1 and text in lines[0], job.stderr
    assert job.stdout == ""
