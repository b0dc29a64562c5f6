"""llama-hpc run --resume: a job killed at any moment goes on, on another grid, and every prompt has one answer, ever the same."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import mpi_jobs
import psutil
import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results
from llama_hpc.results.parts import ProgressFolder
from llama_hpc.results.records import framed, read_records

CASE = "llama_odd"
COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def slow_prompts(tmp_path_factory):
    """The same, for a job that takes seconds on any machine: they arrive one after the other."""
    return write_prompts(tmp_path_factory.mktemp("slow") / "prompts.jsonl", pace=0.2)


def write_prompts(path, pace=0.0):
    ids = [int(i) for i in prompt(CASE)]
    entries = [{"token_ids": ids[i % 7 : i % 7 + 3 + i % 5], "max_tokens": 20 + 30 * (i % 4), "n": 1 + (i % 6 == 0),
                "temperature": 0.8, "seed": i} | ({"arrival_s": pace * i} if pace else {}) for i in range(COUNT)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def undisturbed(command, model, prompts, tmp_path_factory):
    """The digest of a job that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    job = command(1, arguments(model, prompts, output))
    assert job.returncode == 0, job.stderr
    assert [path.name for path in output.parent.iterdir()] == ["out.h5"]
    with read_results(output) as results:
        assert results.num_outputs == COUNT + 4
        return results.digest


def arguments(model, prompts, output, *options):
    return ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos", "--max-seqs", 3, *options]


def answers_in(folder):
    """Whole records of answers that lie in the parts now."""
    return sum(max(0, len(read_records(path).payloads) - 1) for path in folder.parts)


def killed(ranks, argv, folder, answers):
    """Starts a job, and kills all of it with SIGKILL when so many answers are kept."""
    with mpi_jobs.start(ranks, ["-m", "llama_hpc", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        end = time.monotonic() + 60
        while answers_in(folder) < answers and job.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        mpi_jobs.kill_all(job)


def test_a_job_killed_again_and_again_ends_with_the_undisturbed_digest(command, model, prompts, slow_prompts, undisturbed,
                                                                       tmp_path):
    output, folder = tmp_path / "out.h5", ProgressFolder(tmp_path / "out.h5")
    kept = 0
    for ranks, grid, answers in ((2, "2x1x1", 2), (3, "1x3x1", 5), (2, "1x1x2", 11)):
        killed(ranks, arguments(model, slow_prompts, output, "--grid", grid, "--resume"), folder, answers)
        assert not output.exists() and answers_in(folder) >= max(kept, answers)
        kept = answers_in(folder)
    # What a rank had half written.
    with open(folder.parts[-1], "ab") as part:
        part.write(b"\x99\0\0\0half")
    job = command(2, arguments(model, prompts, output, "--grid", "1x2x1", "--resume"))
    assert job.returncode == 0, job.stderr
    assert f"resuming: {kept} answers of 3 earlier runs, 8 bytes of half written ones cut off" in job.stderr
    assert "lost: 8 bytes of half written answers" in job.stderr and f"resumed: {kept} answers of earlier runs" in job.stderr
    with read_results(output) as results:
        assert results.digest == undisturbed == results.verify()
        found = [output.attempt for output in results.outputs()]
        assert len(found) == COUNT + 4 and found.count(3) == COUNT + 4 - kept, "finished answers are not computed again"
        runs = results.provenance["runs"]
        assert [run["grid"] for run in runs] == ["2x1x1", "1x3x1", "1x1x2", "1x2x1"] and results.provenance["torn_bytes"] == 8
        assert sum(run["answers"] for run in runs) == COUNT + 4
        assert results.provenance["incidents"]["resumed_answers"] == kept
    assert not folder.path.exists()


def test_a_complete_output_is_left_as_it_is(command, model, prompts, undisturbed, tmp_path):
    output = tmp_path / "out.h5"
    assert command(1, arguments(model, prompts, output, "--resume")).returncode == 0
    before = output.stat()
    job = command(2, arguments(model, prompts, output, "--resume"))
    assert job.returncode == 0, job.stderr
    assert f"{output} is complete already: {COUNT + 4} answers, digest {undisturbed}" in job.stderr
    assert output.stat().st_mtime_ns == before.st_mtime_ns and output.stat().st_ino == before.st_ino
    # Another job must not take it for its own.
    job = command(2, arguments(model, prompts, output, "--resume", "--max-tokens", 3, "--weights", "q4"))
    assert job.returncode == 2 and "cannot resume" in job.stderr and "weights was q8, now q4" in job.stderr


@pytest.fixture
def unfinished(model, slow_prompts, tmp_path):
    """The output of a job that was killed early."""
    output = tmp_path / "out.h5"
    killed(1, arguments(model, slow_prompts, output), ProgressFolder(output), 1)
    assert not output.exists()
    return output


def test_show_tells_how_far_a_broken_job_is(command, unfinished):
    count = answers_in(ProgressFolder(unfinished))
    job = command(1, ["show", unfinished])
    said = " ".join(job.stdout.split())
    assert f"{unfinished}: not running: --resume goes on, {count} of {COUNT + 4} answers with" in said, job.stderr
    facts = json.loads(command(1, ["show", unfinished, "--json"]).stdout)
    assert (facts["running"], facts["answers"], facts["of"], facts["grid"]) == (False, count, COUNT + 4, "1x1x1")
    # A job that runs holds the lock.
    folder = ProgressFolder(unfinished)
    folder.lock({}, 0)
    facts = json.loads(command(1, ["show", unfinished, "--json"]).stdout)
    assert facts["running"] and facts["answers_per_second"] > 0 and facts["seconds_left"] > 0
    folder.release()


def test_what_would_lose_finished_work_is_refused(command, model, prompts, unfinished, tmp_path):
    """One line each, and everything is still there afterwards."""
    folder = ProgressFolder(unfinished)
    before = {path: path.read_bytes() for path in folder.parts}
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(prompts.read_text().splitlines(keepends=True)[:5]))
    for given, options, ranks, expected in (
            (prompts, (), 1, "an earlier run into .* was not finished: --resume goes on with it, --overwrite begins"),
            (prompts, ("--resume", "--overwrite"), 1, "--resume goes on with a job, --overwrite begins it anew: give one"),
            (fewer, ("--resume",), 3, f"prompts was {COUNT} with hash [0-9a-f]+, now 5 with hash [0-9a-f]+; sampling"),
            (prompts, ("--resume", "--top-k", 5), 1, "sampling settings was of hash [0-9a-f]+, now"),
            (prompts, ("--resume", "--kv-cache", "q8"), 1, "KV cache was f16, now q8")):
        job = command(ranks, arguments(model, given, unfinished, *options))
        lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: error")]
        assert job.returncode == 2 and len(lines) == 1, job.stderr
        assert re.search(expected, lines[0]), lines[0]
    assert {path: path.read_bytes() for path in folder.parts} == before


def test_damaged_and_newer_progress_is_left_as_it_is(command, model, prompts, unfinished):
    (part,) = ProgressFolder(unfinished).parts
    whole = part.read_bytes()
    broken = bytearray(whole)
    broken[-len(whole) // 3] ^= 1
    for content, ranks, expected in (
            (bytes(broken) + whole, 2, rf"{part} is damaged at byte \d+ of \d+, behind \d+ whole records: restore it, or remove"),
            (framed({"version": 9}) + whole, 1, f"{part} is of version 9, this program knows version 1: use a newer one")):
        part.write_bytes(content)
        job = command(ranks, arguments(model, prompts, unfinished, "--resume"))
        (line,) = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: error")]
        assert job.returncode == 1 and re.search(expected, line), line
        assert part.read_bytes() == content


def test_an_output_of_a_newer_version_is_left_as_it_is(command, model, prompts, tmp_path):
    output = tmp_path / "out.h5"
    with h5py.File(output, "w") as file:
        file.attrs.update({"format": "llama_hpc results", "version": 99})
    before = output.read_bytes()
    job = command(2, arguments(model, prompts, output, "--resume"))
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: error")]
    assert job.returncode == 1 and "version 99" in line, line
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_a_second_job_on_the_same_output_is_told_who_has_it(command, model, prompts, slow_prompts, undisturbed, tmp_path):
    output, folder = tmp_path / "out.h5", ProgressFolder(tmp_path / "out.h5")
    with mpi_jobs.start(1, ["-m", "llama_hpc", *arguments(model, slow_prompts, output)], stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL) as first:
        while not folder.parts and first.poll() is None:
            time.sleep(0.01)
        for ranks, option in ((1, "--overwrite"), (3, "--overwrite")):
            job = command(ranks, arguments(model, prompts, output, option))
            (line,) = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc: error")]
            assert job.returncode == 1 and first.poll() is None
            assert re.search(rf"{output} is being written by process \d+, host \S+, since \S+: wait for its end, or give another",
                             line), line
        assert first.wait(60) == 0
    with read_results(output) as results:
        assert results.digest == undisturbed


def test_another_model_under_the_same_name_is_noticed(command, model, prompts, unfinished, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    job = command(2, arguments(other, prompts, unfinished, "--resume"))
    assert job.returncode == 2 and "model content was" in job.stderr, job.stderr


def test_overwrite_begins_anew(command, model, prompts, undisturbed, unfinished):
    job = command(1, arguments(model, prompts, unfinished, "--overwrite"))
    assert job.returncode == 0, job.stderr
    with read_results(unfinished) as results:
        assert results.digest == undisturbed and {output.attempt for output in results.outputs()} == {0}


def signalled(ranks, argv, folder, number, to=0, seconds=60):
    """Starts a job, sends a signal to one of its ranks when an answer is kept; returns the exit code and what it said."""
    with mpi_jobs.start(ranks, ["-m", "llama_hpc", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        end = time.monotonic() + seconds
        while answers_in(folder) < 1 and job.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        python = [p for p in psutil.Process(job.pid).children(recursive=True) if "llama_hpc" in p.cmdline()]
        sorted(python, key=lambda process: process.pid)[to].send_signal(number)
        output, _ = job.communicate(timeout=seconds)
    return job.returncode, output


@pytest.mark.parametrize("grid, to, number", [("1x1x1", 0, signal.SIGTERM), ("3x1x1", 2, signal.SIGUSR1),
                                              ("1x3x1", 0, signal.SIGINT), ("2x1x2", 3, signal.SIGUSR1)])
def test_a_signal_to_any_rank_ends_all_with_what_is_finished(command, model, prompts, slow_prompts, undisturbed, tmp_path, grid,
                                                             to, number):
    output, ranks = tmp_path / "out.h5", eval(grid.replace("x", "*"))
    code, said = signalled(ranks, arguments(model, slow_prompts, output, "--grid", grid), ProgressFolder(output), number, to)
    assert code == 0, said
    with read_results(output) as results:
        count = results.num_outputs
        assert results.status == "incomplete" and results.provenance["stopped"] == number.name and 1 <= count < COUNT + 4
    assert f"stopped by {number.name}: {output} has {count} of {COUNT + 4} answers, --resume goes on" in said
    job = command(2, arguments(model, prompts, output, "--resume"))
    assert job.returncode == 0 and f"resuming: {count} answers of 1 earlier run" in job.stderr, job.stderr
    with read_results(output) as results:
        assert results.status == "complete" and results.digest == undisturbed


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << number - 1)


def test_a_signal_while_the_job_starts_is_an_orderly_end_too(mpirun, model, prompts, undisturbed, tmp_path):
    """A job may be preempted before it has looked at its prompts. What a launcher repeats does not make that a failure."""
    output = tmp_path / "out.h5"
    command = [sys.executable, "-m", "llama_hpc", *map(str, arguments(model, prompts, output, "--resume"))]
    with subprocess.Popen(command, env=mpi_jobs.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as job:
        while not catches(job.pid, signal.SIGTERM):
            assert job.poll() is None
        assert not ProgressFolder(output).path.exists()
        job.terminate()
        job.terminate()
        said, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and f"stopped by SIGTERM: {output} has 0 of {COUNT + 4} answers, --resume goes on" in said, said
    shown = subprocess.run([sys.executable, "-m", "llama_hpc", "show", "--status", output], env=mpi_jobs.environment(),
                           capture_output=True, text=True)
    assert shown.stdout == "incomplete\n"
    job = mpirun(1, ["-m", "llama_hpc", *arguments(model, prompts, output, "--resume")])
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        assert results.status == "complete" and results.digest == undisturbed


def test_a_time_limit_and_the_schedulers_end_stop_a_run(mpirun, model, prompts, undisturbed, tmp_path):
    output = tmp_path / "out.h5"
    soon = {"SLURM_JOB_END_TIME": str(int(time.time()) + 61)}
    for options, env, reason in ((("--time-limit", "0.001"), {}, "the time limit of 0.001 s"),
                                 (("--resume",), soon, "the job's end in 60 s")):
        job = mpirun(2, ["-m", "llama_hpc", *arguments(model, prompts, output, *options)], env=env)
        assert job.returncode == 0, job.stderr
        assert f"stopped by {reason}: {output} has 0 of {COUNT + 4} answers, --resume goes on" in job.stderr
    job = mpirun(1, ["-m", "llama_hpc", *arguments(model, prompts, output, "--resume", "--time-limit", 1000)])
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        assert results.status == "complete" and results.digest == undisturbed
