"""Runs the SPMD tests of this folder on every rank of a job.

``mpirun -n N python tests/mpi/spmd/run.py CHECKPOINTS [pytest options]``: CHECKPOINTS is the folder that
``models.write_models`` filled. The first rank reports; a rank on which a test fails prints what happened and ends the job at
once, so that nobody waits for it. Tests get the world as the fixture ``comm`` and must call collective functions in the same
order on every rank.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.abort import guarded
from llama_hpc.runtime.launch import check_world, world

FOLDER = Path(__file__).resolve().parent
THREADS = 2


class Ranks:
    """A pytest plugin: fixtures of the job, and the end of the job when a test fails anywhere."""

    def __init__(self, comm, checkpoints: Path):
        self.world, self.folder, self.stderr = comm, checkpoints, os.dup(2)

    @pytest.fixture
    def comm(self):
        return self.world

    @pytest.fixture
    def checkpoints(self):
        return self.folder

    def pytest_runtest_logreport(self, report):
        self._check(report)

    def pytest_collectreport(self, report):
        self._check(report)

    def _check(self, report):
        if not report.failed:
            return
        # Of ranks that fail at the same moment the lowest one speaks: its abort ends the others while they wait.
        time.sleep(min(0.5 * self.world.rank, 3))
        text = f"rank {self.world.rank} of {self.world.size}: {report.nodeid} failed\n{report.longreprtext}\n"
        os.write(self.stderr, text.encode())
        # A launcher may not pass on what it has not read when it hears of the end.
        time.sleep(0.2)
        self.world.Abort(1)


def compile_kernels(comm) -> None:
    """The first rank compiles into the disk cache; then all load from there."""
    from mpi4py import MPI

    from llama_hpc.engine.warmup import once_per_node, warm_up
    from llama_hpc.kernels.cpu.calls import shared_pool
    once_per_node(comm, lambda: [warm_up(name, shared_pool(THREADS), MPI.COMM_SELF) for name in ("f32", "q8", "q3_5")])


def main() -> int:
    """Returns pytest's exit code, the largest of all ranks."""
    comm = world()
    check_world(comm)
    numba_setup.configure(THREADS)
    compile_kernels(comm)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]
    # A rank that hangs says where, before the launcher's time limit.
    options = ["-p", "no:cacheprovider", "--color=no", "-o", "faulthandler_timeout=60", *sys.argv[2:]]
    files = map(str, sorted(FOLDER.glob("check_*.py"))) if not any(a.endswith(".py") for a in sys.argv[2:]) else []
    with contextlib.ExitStack() as stack:
        if comm.rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        code = pytest.main([*options, *files], plugins=[Ranks(comm, Path(sys.argv[1]))])
    return max(comm.allgather(int(code)))


if __name__ == "__main__":
    sys.exit(guarded(main))
