"""Where a result came from."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata

import pytest

import llama_hpc
from llama_hpc.runtime import provenance


def test_facts(monkeypatch):
    monkeypatch.setattr("sys.argv", ["llama-hpc", "run", "a model"])
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    facts = provenance.collect()
    assert facts["llama_hpc"] == llama_hpc.__version__
    assert facts["numpy"] == metadata.version("numpy")
    assert facts["python"] == platform.python_version()
    assert facts["command"] == "llama-hpc run 'a model'"
    assert facts["job"] == "SLURM_JOB_ID=4711"
    assert facts["host"] == platform.node()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(facts["start_time"])).total_seconds()) < 60
    assert all(isinstance(value, str) and value for value in facts.values())


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_the_library_is_named_once_mpi_runs(mpirun, mpi):
    code = (
        "from llama_hpc.runtime import launch, provenance\n"
        "assert 'mpi_library' not in provenance.collect()\n"
        "launch.world()\n"
        "print(provenance.collect()['mpi_library'])\n"
    )
    job = mpirun(1, ["-c", code], mpi=mpi)
    name = {"openmpi": "Open MPI v", "mpich": "MPICH Version"}[mpi]
    assert job.stdout.startswith(name), job.stderr
    assert job.stdout.count("\n") == 1


def test_git_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance.git_commit(tmp_path) == ""
    git("init")
    assert provenance.git_commit(tmp_path) == ""
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert provenance.git_commit(tmp_path) == commit
    (tmp_path / "untracked").write_text("x")
    assert provenance.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert provenance.git_commit(tmp_path) == f"{commit}-dirty"
