"""llama-hpc run where memory runs short: smaller batches, the same answers."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mpi_jobs
import numpy as np
import pytest
from reference_models import prompt, write_checkpoint, write_random_llama

from llama_hpc.kernels.cpu.places import cgroup_folders
from llama_hpc.results import read_results

CASE = "llama_odd"
COUNT = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model and prompts with long answers."""
    folder = tmp_path_factory.mktemp("files")
    ids = [int(i) for i in prompt(CASE)]
    entries = [{"token_ids": ids[i % 7 : i % 7 + 3 + i % 5], "max_tokens": 80 + 2 * i, "temperature": 0.8, "seed": i}
               for i in range(COUNT)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return write_checkpoint(CASE, folder / "model"), folder / "prompts.jsonl"


def run(mpirun, files, output, grid, rank):
    ranks = int(np.prod([int(n) for n in grid.split("x")]))
    job = mpirun(ranks, [Path(__file__).with_name("short_of_memory.py"), rank, "run", files[0], "--prompts", files[1], "--output",
                         output, "--ignore-eos", "--grid", grid, "--max-seqs", 8])
    assert job.returncode == 0, job.stderr
    return job.stderr


@pytest.fixture(scope="module")
def undisturbed(mpirun, files, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    said = run(mpirun, files, output, "1x1x1", "none")
    assert "memory is short" not in said and "nothing was retried, lost or resumed" in said
    with read_results(output) as results:
        assert results.provenance["incidents"]["pressure"] == results.provenance["incidents"]["setbacks"] == 0
        return results.digest


@pytest.mark.parametrize("grid, rank", [("1x1x1", 0), ("1x3x1", 0), ("2x1x2", 3)])
def test_batches_shrink_and_no_bit_changes(mpirun, files, undisturbed, tmp_path, grid, rank):
    """The rank that sees it need not lead its replica; others go on as they were."""
    output = tmp_path / "out.h5"
    said = run(mpirun, files, output, grid, rank)
    assert said.count("memory is short on ") == 1 and f"{f'rank {rank}: ' if rank else ''}warning: memory is short on" in said
    with read_results(output) as results:
        assert results.digest == undisturbed == results.verify()
        metrics, incidents = results.file["metrics/ranks"], results.provenance["incidents"]
        events, setbacks = metrics["pressure"][:], metrics["setbacks"][:]
        concerned = np.array([place["data"] for place in results.provenance["rank_table"]]) == (rank >= 2 and grid == "2x1x2")
        assert (events[concerned] >= 3).all() and (setbacks[concerned] > 0).all(), "all ranks of the replica, alike"
        assert not events[~concerned].any()
        assert incidents["pressure"] == events[concerned][0] and incidents["setbacks"] == setbacks[concerned][0]
        assert f"{incidents['pressure']} shrinkings of the cache for want of memory" in said


@pytest.fixture
def cgroup():
    """The files of a new cgroup for the limit of its memory and for the most that it has used."""
    for parent in cgroup_folders("memory"):
        folder = parent / f"llama-hpc-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            names = "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.max", "memory.peak"
            files = [folder / name for name in names if (folder / name).exists()]
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run("true", preexec_fn=lambda: join(folder), check=True)  # noqa: B023
                if len(files) == 2:
                    yield files
                    files = None
            folder.rmdir()
            if files is None:
                return
    pytest.skip("no cgroup can be made here")


def join(folder):
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def test_in_a_cgroup_that_would_kill_it_a_job_completes(cgroup, tmp_path):
    """A cache of 70 MB that grows within a second or so, in a cgroup with room for half of it."""
    limit, most = cgroup
    model = write_random_llama(tmp_path / "model", 64, 64, 16, 2, 2, 128)
    prompts = [{"token_ids": [(i * 7 + j) % 127 for j in range(90)], "max_tokens": 60} for i in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in prompts))
    def run(output, program):
        command = [sys.executable, *program, "run", model, "--prompts", tmp_path / "prompts.jsonl", "--output", output,
                   "--ignore-eos", "--weights", "f32", "--grid", "1x1x1", "--kv-memory", "128M", "--max-seqs", "60",
                   "--token-budget", "256", "--no-prefix-sharing"]
        job = subprocess.run(list(map(str, command)), env=mpi_jobs.environment(), capture_output=True, text=True,
                             preexec_fn=lambda: join(limit.parent), timeout=120)
        assert job.returncode == 0, job.stderr
        return read_results(output)
    with run(tmp_path / "free.h5", ["-m", "llama_hpc"]) as free:
        digest, cache = free.digest, free.provenance["rank_table"][0]["cache_bytes"]
    limit.write_text(str(int(most.read_text()) - cache // 2))
    with run(tmp_path / "out.h5", [Path(__file__).with_name("short_of_memory.py"), "none"]) as results:
        assert results.digest == digest and results.provenance["incidents"]["pressure"] > 0
