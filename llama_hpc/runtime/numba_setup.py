"""Settings that Numba reads when it is first imported: threads, how they wait, and where compiled code is kept."""

import hashlib
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from llama_hpc.errors import UsageError


def configure(threads: int) -> None:
    """Prepares the environment of Numba. Call before anything imports it; no effect later.

    Numba's own ``threads`` only run the loops of ``kernels/cpu/quantize_loops``; a model's kernels have their pool. Waiting ones
    sleep instead of spinning, so that ranks which share cores do not stall each other. Compiled code goes to a folder that is
    named after what it is made from and for, below NUMBA_CACHE_DIR or else in one of this user on a node-local disk.
    """
    if "numba" in sys.modules:
        return
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given is None:
        folder = cache_folder()
    else:
        # Set by a process that started this one, the folder may be the right one already. Numba makes what is missing.
        folder = Path(given) if Path(given).name == _folder_name() else Path(given) / _folder_name()
    if folder is not None:
        os.environ["NUMBA_CACHE_DIR"] = str(folder)


def cache_folder() -> Path | None:
    """The folder of compiled code, made if need be; None where it belongs to somebody else or cannot be made."""
    base = Path(tempfile.gettempdir()) / f"llama_hpc-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        # Compiled code is executed: a folder that another user could have prepared is not used.
        found = base.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            return None
        folder = base / _folder_name()
        folder.mkdir(exist_ok=True)
        return folder
    except OSError:
        return None


def _folder_name() -> str:
    """Changes with any kernel source, the versions of what compiles it, the processor, and LLAMA_HPC_KERNELS.

    Numba notices neither that choice nor changes in the modules that a kernel imports. Processors it tells apart, but nodes of
    two kinds that share a folder would write the same index files.
    """
    from llvmlite import binding
    name = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES", binding.get_host_cpu_features().flatten())
    facts = (sys.version, version("numba"), version("llvmlite"), name, features, os.environ.get("LLAMA_HPC_KERNELS", ""))
    digest = hashlib.sha256(repr(facts).encode())
    folder = Path(__file__).resolve().parent.parent / "kernels"
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.read_bytes())
    return f"numba-{digest.hexdigest()[:16]}"


def check_kernels() -> None:
    """Raises UsageError where LLAMA_HPC_KERNELS asks for kernels that this processor cannot run. Imports Numba."""
    from llama_hpc.kernels.cpu.target import kernels
    try:
        kernels()
    except ValueError as error:
        raise UsageError(str(error)) from None
