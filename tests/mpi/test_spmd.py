"""Runs the SPMD tests (spmd/check_*.py) under mpirun, every rank in step."""

import sys
import time
from pathlib import Path

import pytest

SPMD = Path(__file__).parent / "spmd"
RUN = SPMD / "run.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    sys.path.insert(0, str(SPMD))
    from models import write_models
    return write_models(tmp_path_factory.mktemp("spmd"))


def check(job):
    assert job.returncode == 0 and " passed" in job.stdout, f"{job.stdout}\n{job.stderr}"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_under_open_mpi(mpirun, checkpoints, n):
    check(mpirun(n, [RUN, checkpoints], timeout=300))


@pytest.mark.parametrize("n", [4])
def test_under_mpich(mpirun, checkpoints, n):
    check(mpirun(n, [RUN, checkpoints], mpi="mpich", timeout=300))


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_a_failure_on_one_rank_ends_the_job(mpirun, tmp_path, mpi):
    """What the runner promises: no rank waits, and the rank where it happened says what."""
    test = tmp_path / "check_alone.py"
    test.write_text("def test_alone(comm):\n    assert comm.rank != 1, 'broken here'\n    comm.Barrier()\n")
    start = time.monotonic()
    job = mpirun(3, [RUN, tmp_path, test], mpi=mpi, timeout=90)
    assert time.monotonic() - start < 60
    assert job.returncode != 0
    assert "rank 1 of 3" in job.stderr and "broken here" in job.stderr
    assert job.stderr.count("test_alone failed") == 1
