"""Fixtures for all tests: running Python programs under mpirun, and outside test data."""

import logging
import os
from pathlib import Path

import mpi_jobs
import pytest
import standing_jobs

from llama_hpc.runtime import numba_setup

# Before anything imports Numba: its cache for this process is the one of the kernels' present sources, as in a job, since
# Numba itself would go on using code that was compiled before a module that a kernel imports was edited.
numba_setup.configure(threads=2)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run CUDA kernels on a GPU in place of the emulated one")


def pytest_configure(config):
    config.addinivalue_line("markers", "openmpi: what only Open MPI can do, such as to outlive ranks")


def pytest_collection_modifyitems(config, items):
    """What compiles all kernels comes first, see ``cache`` there. Under another MPI than usual, only tests that start jobs."""
    items.sort(key=lambda item: item.path.name != "test_warmup.py")
    if mpi_jobs.MPI != mpi_jobs.USUAL:
        jobs = [item for item in items if {"mpirun", "command"} & {*item.fixturenames} and not item.get_closest_marker("openmpi")]
        config.hook.pytest_deselected(items=[item for item in items if item not in jobs])
        items[:] = jobs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where files run side by side: the tests of a file share what they make, and there is one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/cluster" if file.startswith("tests/cluster/") else file
    return ByFile(config, log)


@pytest.fixture(scope="session")
def mpirun():
    """The function ``mpi_jobs.mpirun``."""
    return mpi_jobs.mpirun


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The function ``run`` of ``standing_jobs.StandingJobs``: a command line of llama-hpc on some ranks."""
    jobs = standing_jobs.StandingJobs(lambda: tmp_path_factory.mktemp("job"))
    yield jobs.run
    jobs.close()


@pytest.fixture
def logged(monkeypatch):
    """The records of llama_hpc from INFO on, while a test runs, whatever commands in this process have set up before it."""
    records, handler, logger = [], logging.Handler(), logging.getLogger("llama_hpc")
    handler.emit = records.append
    level = logger.level
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.INFO)
    yield records
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def affinity():
    """A command in this process binds it to cores; the next test has all of them again."""
    cpus = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="session")
def test_data():
    """The folder that LLAMA_HPC_TEST_DATA names (with models/ and texts/); skips the test when it is not set."""
    folder = os.environ.get("LLAMA_HPC_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LLAMA_HPC_TEST_DATA does not name a folder")
    return Path(folder)


@pytest.fixture
def pool():
    """The function that makes pools, which are closed behind the test."""
    from llama_hpc.kernels.cpu.workers import Pool
    pools = []

    def make(*arguments, **keywords):
        pools.append(Pool(*arguments, **keywords))
        return pools[-1]
    yield make
    for each in pools:
        each.close()
