"""--device: errors before any weight is read, one line where ranks stay on the CPU, and what a dry run tells of GPUs."""

import json
from pathlib import Path

import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc import LLM
from llama_hpc.errors import DeviceUnavailable, UsageError
from llama_hpc.runtime import devices

CASE = "llama_odd"
PRETENDED = Path(__file__).with_name("pretended_gpus.py")
H200 = "NVIDIA H200 (80.00 GiB)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(CASE, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(tmp_path):
    """A folder with prompts and texts."""
    ids = [int(i) for i in prompt(CASE)]
    for name in ("prompts.jsonl", "texts.jsonl"):
        (tmp_path / name).write_text(json.dumps({"token_ids": ids[:5]}) + "\n")
    return tmp_path


def run(model, *options):
    return ["run", model, "--prompts", "prompts.jsonl", "--output", "out.h5", "--max-tokens", 4, *options]


@pytest.fixture
def dry_run(mpirun, folder, model):
    """The function that tries a run on so many ranks of a node with so many GPUs of ``memory`` GiB."""
    def try_it(ranks, gpus, *options, memory=80):
        return mpirun(ranks, [PRETENDED, gpus, memory, *run(model, "--dry-run", *options)], cwd=folder)
    return try_it


def errors(job):
    return [line for line in job.stderr.splitlines() if "llama-hpc: error:" in line]


@pytest.mark.skipif(devices.look("gpu").why != "no NVIDIA driver", reason="for a node without an NVIDIA driver")
def test_a_gpu_on_a_node_without_a_driver(command, folder, model):
    """One line, exit code 1, for run, score and dry runs on three ranks; auto says nothing, as nobody asked."""
    for arguments in (run(model), run(model, "--dry-run"),
                      ["score", model, "--texts", "texts.jsonl", "--output", "out.h5"]):
        job = command(3, [*arguments, "--device", "gpu"], cwd=folder)
        assert job.returncode == 1 and len(errors(job)) == 1 and not (folder / "out.h5").exists()
        assert "no NVIDIA driver; --device auto or cpu computes on the CPU" in job.stderr
    job = command(1, run(model, "--device", "auto"), cwd=folder)
    assert job.returncode == 0 and "NVIDIA" not in job.stderr
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver"):
        LLM(model, device="gpu")


def test_words_that_are_no_device(command, folder, model):
    job = command(1, run(model, "--device", "cuda"), cwd=folder)
    assert job.returncode == 2 and "argument --device: invalid choice: 'cuda'" in job.stderr
    with pytest.raises(UsageError, match="device must be one of auto, cpu, gpu, got 'cuda'"):
        LLM(model, device="cuda")


def test_a_gpu_for_each_rank(dry_run):
    job = dry_run(3, 4, "--device", "gpu")
    assert job.returncode == 0 and not errors(job), job.stderr
    assert f"gpu 0-2, {H200}" in job.stdout and "of 80.00 GiB;" in job.stdout
    job = dry_run(2, 4, "--device", "cpu")
    assert job.returncode == 0 and "gpu" not in job.stdout


def test_more_ranks_than_gpus(dry_run):
    """Of each how many there are, exit code 2; with auto the surplus computes on the CPU, and one line says so."""
    job = dry_run(3, 2, "--device", "gpu")
    assert job.returncode == 2 and len(errors(job)) == 1 and ": 2 GPUs for 3 ranks; start one rank for each GPU" in job.stderr
    job = dry_run(3, 2)
    assert job.returncode == 0, job.stderr
    assert job.stderr.count("rank 2 computes on the CPU: 2 GPUs for 3 ranks") == 1
    lines = job.stdout.splitlines()
    table = next(number for number, line in enumerate(lines) if line.startswith("ranks  host"))
    assert lines[table + 1].endswith(f"gpu 0-1, {H200}") and lines[table + 2].endswith("cpu")


def test_gpus_of_too_little_memory(dry_run):
    """How much is missing and which grid would fit, exit code 2; with auto all ranks compute on the CPU."""
    for grid, start in (((), "the model and its cache need "), (("--grid", "1x1x1"), "on grid 1x1x1 the model and a cache ")):
        job = dry_run(1, 1, "--device", "gpu", *grid, "--weights", "f32", memory=0.3456)
        assert job.returncode == 2 and len(errors(job)) == 1, job.stderr
        assert errors(job)[0].startswith(f"llama-hpc: error: {start}") and "GiB of its GPU" in job.stderr
        job = dry_run(1, 1, *grid, "--weights", "f32", memory=0.3456)
        assert job.returncode == 0 and job.stderr.count(f"all ranks compute on the CPU: {start}") == 1, job.stderr
        assert "gpu" not in job.stdout


def test_a_login_node_has_no_gpus_for_a_job(command, folder, model):
    job = command(1, run(model, "--dry-run", "--device", "gpu", "--ranks", 4, "--memory", "1G"), cwd=folder)
    assert job.returncode == 0 and "a dry run also checks where they are, and their GPUs" in job.stdout
