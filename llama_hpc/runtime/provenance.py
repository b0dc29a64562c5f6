"""Where a result came from: versions, command, host, scheduler job, source commit, start time."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import llama_hpc
from llama_hpc.runtime.launch import started_mpi
from llama_hpc.runtime.topology import hostname

_PACKAGES = ("numpy", "numba", "mpi4py", "h5py")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")        # of which one is installed

# SLURM, PBS, Flux, LSF: the first one set counts.
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "FLUX_JOB_ID", "LSB_JOBID")


def collect() -> dict[str, str]:
    """Facts about this process as text, for the attributes of a result file; what is unknown is left out.

    Keys: ``llama_hpc``, ``python``, ``numpy``, ``numba``, ``mpi4py``, ``h5py``, ``cupy`` (versions), ``mpi_library`` (once
    MPI is started), ``command``, ``host``, ``machine``, ``job`` (variable=value of the scheduler), ``git_commit``
    (with ``-dirty`` when tracked files were changed), ``start_time`` (of this call, ISO 8601, UTC).
    Makes no MPI communication.
    """
    facts = {
        "llama_hpc": llama_hpc.__version__,
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "cupy": next(filter(None, map(_version, _CUPY)), ""),
        "mpi_library": _mpi_library(),
        "command": shlex.join(sys.argv),
        "host": hostname(),
        "machine": platform.machine(),
        "job": next((f"{name}={os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name)), ""),
        "git_commit": git_commit(Path(llama_hpc.__file__).resolve().parents[1]),
        "start_time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {name: value for name, value in facts.items() if value}


def git_commit(folder: Path) -> str:
    """The commit checked out in ``folder``, ``-dirty`` when tracked files differ from it; empty if there is none."""
    if not (folder / ".git").exists():
        return ""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _mpi_library() -> str:
    MPI = started_mpi()
    return " ".join(MPI.Get_library_version().replace("\0", "").split()) if MPI else ""
