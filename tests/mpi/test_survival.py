"""Ranks that die under ``mpirun --with-ft ulfm``: the others end the job, with the digest of one that nobody disturbs."""

import json
from pathlib import Path

import h5py
import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results

pytestmark = pytest.mark.openmpi
FAILING = Path(__file__).parents[1] / "cli" / "failing_rank.py"
ULFM = ("--with-ft", "ulfm")
CASE, COUNT = "llama_odd", 40

# Grid, spare ranks, what happens, and to which ranks; how many replicas there are when all is done.
CASES = {
    "one of three replicas": ("3x1x1", 0, "killed later", "1", 2),
    "the first rank": ("3x1x1", 0, "killed later", "0", 2),
    "half of a replica in shared memory": ("2x1x2", 0, "killed later", "3", 2),
    "a stage": ("2x2x1", 0, "killed later", "0", 2),
    "a spare takes its place": ("2x1x2", 1, "killed later", "2", 2),
    "a spare": ("2x1x1", 1, "killed at start", "2", 2),
    "the only replica": ("1x1x3", 0, "killed", "1", 2),
    "at the start": ("3x1x1", 0, "killed at start", "0", 2),
    "while loading": ("2x1x2", 0, "killed in loading", "1", 2),
    "while writing": ("3x1x1", 0, "killed in writing", "0", 2),
    "one more while they regroup": ("2x1x2", 0, "killed later,killed in regrouping", "1,2", 2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    ids = [int(i) for i in prompt(CASE)]
    path.write_text("".join(json.dumps({"token_ids": ids[i % 7 : i % 7 + 3 + i % 5], "max_tokens": 20 + 30 * (i % 4), "seed": i,
                                        "n": 1 + (i % 6 == 0), "temperature": 0.8}) + "\n" for i in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def run(mpirun, model, prompts):
    """run(ranks, faults, failing, output, options…): the finished job."""
    def start(ranks, faults, failing, output, *options, launcher=ULFM):
        argv = [FAILING, faults, failing, "run", model, "--prompts", prompts, "--output", output, "--ignore-eos", "--max-seqs", 3,
                *options]
        return mpirun(ranks, argv, mpi="openmpi", options=launcher, timeout=120)
    return start


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    job = run(1, "killed", "9", output, launcher=())
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        return results.digest


@pytest.mark.parametrize("name", CASES)
def test_the_others_end_the_job(run, undisturbed, tmp_path, name):
    grid, spares, faults, failing, replicas = CASES[name]
    data, pipeline, tensor = map(int, grid.split("x"))
    job = run(data * pipeline * tensor + spares, faults, failing, tmp_path / "out.h5", "--grid", grid, "--spares", spares)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"], job.stderr
    with read_results(tmp_path / "out.h5") as results:
        assert (results.status, results.digest) == ("complete", undisturbed), job.stderr
        incidents = results.provenance["incidents"]
        table = results.provenance["rank_table"]
    lost = failing.split(",")
    assert incidents["ranks_lost"] == len(lost)
    assert all(f"rank {rank} (" in job.stderr for rank in lost) and "Traceback" not in job.stderr
    assert len({row["data"] for row in table if "data" in row}) <= replicas


def test_replicas_that_lost_nobody_keep_what_they_are_answering(run, undisturbed, tmp_path):
    """Of three replicas two take part to the end, each as one that was never begun again: a row of measures for each."""
    run(3, "killed later", "1", tmp_path / "out.h5", "--grid", "3x1x1")
    with read_results(tmp_path / "out.h5") as results:
        assert results.digest == undisturbed
        assert results.provenance["incidents"]["went_on_without"] == 1
    with h5py.File(tmp_path / "out.h5") as file:
        assert len(file["metrics/ranks/steps"]) == 2 and len(set(file["metrics/steps/rank"][:])) == 2


def test_without_fault_tolerance_the_job_ends_at_once_and_resumes(run, undisturbed, tmp_path):
    output = tmp_path / "out.h5"
    job = run(3, "killed later", "1", output, "--grid", "3x1x1", launcher=())
    assert job.returncode != 0 and not output.exists()
    assert "rank 1" in job.stdout + job.stderr
    job = run(2, "killed", "9", output, "--grid", "1x1x2", "--resume", launcher=())
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        assert results.digest == undisturbed


def test_spares_without_fault_tolerance_are_refused(run, tmp_path):
    job = run(2, "killed", "9", tmp_path / "out.h5", "--spares", 1, launcher=())
    assert job.returncode == 2 and job.stderr.count("--with-ft ulfm") == 1
