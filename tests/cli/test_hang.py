"""A rank that is stopped in the midst of a run: the others name it within the limit, and the job goes on with --resume."""

import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import mpi_jobs
import psutil
import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results
from llama_hpc.results.parts import ProgressFolder

LIMIT, COUNT = 2, 60
# The grid of three ranks, the rank that is stopped, the library if not the usual one; what others say of where they are.
CASES = {
    "last stage": ("1x3x1", 2, None, r"ranks 0-1: step \d+, "),
    "first stage": ("1x3x1", 0, "mpich", r"rank 1: step \d+, receive from rank 0 \[take, comm/pipeline.py:\d+\]"),
    "first tensor rank": ("1x1x3", 0, None, r"ranks? 1.*: step \d+, (compute, .*\[execute, |outcome of)"),
    "last replica": ("3x1x1", 2, None, r"waiting for other replicas"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint("llama_odd", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    ids = [int(i) for i in prompt("llama_odd")]
    path.write_text("".join(json.dumps({"token_ids": ids[i % 7 : i % 7 + 5], "max_tokens": 40 + i}) + "\n" for i in range(COUNT)))
    return path


def arguments(model, prompts, output, *options):
    return ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos", "--max-seqs", 3,
            "--hang-limit", LIMIT, *options]


def stopped(argv, folder, rank, mpi):
    """Starts a job of three ranks, and stops one when an answer is kept: (exit code, what it said, seconds until its end)."""
    with mpi_jobs.start(3, ["-m", "llama_hpc", *argv], mpi=mpi, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True) as job:
        end = time.monotonic() + 60
        while not folder.parts and job.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        ranks = [process for process in psutil.Process(job.pid).children(recursive=True) if "llama_hpc" in process.cmdline()]
        def number(process):
            return int(process.environ().get("OMPI_COMM_WORLD_RANK") or process.environ()["PMI_RANK"])
        (process,) = [process for process in ranks if number(process) == rank]
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        output, _ = job.communicate(timeout=90)
        seconds = time.monotonic() - start
        assert psutil.wait_procs(ranks, 5)[1] == []
    return job.returncode, output, seconds


@pytest.fixture(scope="module")
def jobs(model, prompts, tmp_path_factory):
    """All cases, several at a time: their outputs and what came of them."""
    def run(output, grid, rank, mpi, _):
        return output, stopped(arguments(model, prompts, output, "--grid", grid), ProgressFolder(output), rank, mpi)
    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(run, tmp_path_factory.mktemp("job") / "out.h5", *case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_rank_is_named_and_the_job_ends(jobs, name):
    _, rank, _, others = CASES[name]
    output, (code, said, seconds) = jobs[name].result()
    lines = [line for line in said.splitlines() if "llama-hpc:" in line]
    assert code == 1 and len(lines) == 1, said
    assert re.search(rf"no progress for {LIMIT} s \(the hang limit\): rank {rank} \(process \d+ on \S+\) is stopped by a ",
                     lines[0]), lines
    assert re.search(others, lines[0]), lines
    assert f"stacks in {output}.progress/hang-*.txt; finished answers are kept, --resume goes on" in lines[0]
    stacks = (output.parent / "out.h5.progress" / f"hang-{(rank + 1) % 3}.txt").read_text()
    assert "thread MainThread:" in stacks and "llama_hpc/engine/" in stacks
    assert seconds < 60


def test_what_hung_goes_on_with_the_same_digest(command, model, prompts, jobs, tmp_path):
    job = command(1, arguments(model, prompts, tmp_path / "whole.h5"))
    assert job.returncode == 0, job.stderr
    output, _ = jobs["last stage"].result()
    job = command(2, arguments(model, prompts, output, "--resume"))
    assert job.returncode == 0 and "resuming: " in job.stderr, job.stderr
    with read_results(tmp_path / "whole.h5") as whole, read_results(output) as results:
        assert results.digest == whole.digest and {found.attempt for found in results.outputs()} == {0, 1}
    assert not ProgressFolder(output).path.exists()
