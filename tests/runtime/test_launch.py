"""The launch check: fake environments of every launcher, and real jobs that are or are not one MPI world."""

import pytest

from llama_hpc.errors import LaunchError
from llama_hpc.runtime import launch

OPENMPI_ON_SLURM = {  # mpirun -n 6 inside sbatch: srun started one daemon on each of two nodes
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "PMIX_RANK": "5",
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8",
}  # fmt: skip
CASES = {
    "alone": ({}, 0, None),
    "mpirun of Open MPI": ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "2"}, 2, 4),
    "mpirun of MPICH": ({"PMI_RANK": "1", "PMI_SIZE": "3"}, 1, 3),
    "srun": ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, 3, 4),
    "srun --mpi=pmix": ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "PMIX_RANK": "3"}, 3, 4),
    "batch script itself": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 0, None),
    "mpirun in sbatch": (OPENMPI_ON_SLURM, 5, 6),
    "flux run": ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, 1, 2),
}


class World:
    """Stands for a communicator of ``size`` ranks."""

    def __init__(self, size):
        self.size = size


@pytest.fixture
def environment(monkeypatch):
    for rank, size in launch._LAUNCHERS:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)
    monkeypatch.delenv("PMIX_RANK", raising=False)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize("case", CASES)
def test_rank_and_tasks_are_the_innermost_launchers(environment, case):
    variables, rank, tasks = CASES[case]
    environment(variables)
    assert (launch.environment_rank(), launch.expected_tasks()) == (rank, tasks)
    launch.check_world(World(tasks or 1))


def test_lonely_ranks_of_srun_are_told_the_fix(environment):
    environment({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(LaunchError, match=r"4 processes were started .* joined 1 .*srun --mpi=pmix") as caught:
        launch.check_world(World(1))
    assert caught.value.collective


LOCAL = {
    "alone": ({}, 1),
    "mpirun of Open MPI in sbatch": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 3),
    "mpirun of MPICH": ({"MPI_LOCALNRANKS": "2"}, 2),
    "srun": ({"SLURM_STEP_TASKS_PER_NODE": "4(x3),12"}, 12),
}


@pytest.mark.parametrize("case", LOCAL)
def test_tasks_of_the_node(monkeypatch, case):
    for name in launch._LOCAL_TASKS:
        monkeypatch.delenv(name, raising=False)
    variables, tasks = LOCAL[case]
    for item in variables.items():
        monkeypatch.setenv(*item)
    assert launch.local_tasks() == tasks


WAITING = """
import time
from llama_hpc.runtime import launch
from llama_hpc.runtime.topology import node_cores
comm = launch.world()
comm.Barrier()
before, start = time.process_time(), time.monotonic()
if comm.rank == 0:
    time.sleep(2)
comm.Barrier()
used = comm.allreduce(time.process_time() - before)
assert comm.size == node_cores() + 2
if comm.rank == 0:
    print(used / (time.monotonic() - start))
"""


def test_ranks_that_wait_give_way(mpirun):
    """More ranks than cores: those that wait inside of MPICH leave the cores to others."""
    from llama_hpc.runtime.topology import node_cores
    job = mpirun(node_cores() + 2, ["-c", WAITING], mpi="mpich")
    assert job.returncode == 0, job.stderr
    assert float(job.stdout) < 0.5 * node_cores()


CHECK = """
from llama_hpc.runtime import abort, launch
import sys
def work():
    launch.check_world(launch.world())
    sys.stdout.write(f"joined {launch.world().size}\\n")
sys.exit(abort.guarded(work))
"""


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_a_real_job_is_one_world(mpirun, mpi):
    job = mpirun(3, ["-c", CHECK], mpi=mpi)
    assert job.returncode == 0, job.stderr
    assert job.stdout.split("\n").count("joined 3") == 3


def test_wrong_launcher_gives_one_line(mpirun):
    """MPICH's mpiexec with Open MPI's library: three processes, three worlds."""
    job = mpirun(3, ["-W", "ignore", "-c", CHECK], mpi="mpich", env={"MPI4PY_LIBMPI": None})
    ours = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert len(ours) == 1
    assert "3 processes were started but MPI (Open MPI" in ours[0]
    assert "joined 1 of them" in ours[0] and "MPI4PY_LIBMPI" in ours[0]
    assert job.returncode == 1 and "joined" not in job.stdout


def test_missing_library_is_said_once(mpirun):
    job = mpirun(2, ["-c", CHECK], env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    ours = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert len(ours) == 1 and "MPI cannot be started" in ours[0] and "/nowhere/libmpi.so" in ours[0]
    assert job.returncode == 1
