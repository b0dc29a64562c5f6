"""What this process may use of its node: cores, memory, threads. Linux; no MPI.

Sources: sched_setaffinity(2), the kernel's cgroup-v1 and cgroup-v2 documents, sysfs cpu topology, the output
environment variables of srun(1) and sbatch(1).
"""

import os
import socket
from math import ceil
from pathlib import Path

from llama_hpc.errors import UsageError

_MIB = 1 << 20


def hostname() -> str:
    """Name of this node."""
    return socket.gethostname()


def available_cores() -> int:
    """Physical cores that this process may run on: its affinity, limited by a cgroup's CPU quota (at least 1)."""
    return max(1, min(_physical(os.sched_getaffinity(0)), _cpu_quota()))


def available_memory() -> int:
    """Bytes that the processes of this job may still use on this node, all together.

    The least of what the kernel has free, what the cgroups leave (pages of mapped files can be dropped and do not
    count as used) and what SLURM granted. An allocation of a GPU's memory is not looked at.
    """
    import psutil

    limits = [psutil.virtual_memory().available, *_cgroup_memory()]
    granted = _number("SLURM_MEM_PER_NODE")
    if not granted and (per_cpu := _number("SLURM_MEM_PER_CPU")):
        granted = per_cpu * (_number("SLURM_CPUS_ON_NODE") or 1)
    if granted:
        limits.append(granted * _MIB)
    return max(0, min(limits))


def default_threads(ranks_on_node: int, requested: int | None = None) -> int:
    """Threads of this rank: ``requested``, else OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, else its share of the cores.

    The share is the cores of the node that the job may use, divided by ``ranks_on_node``, and never more than this
    process's affinity: a rank that its launcher bound to cores takes those.
    Raises UsageError for values that are no positive integers.
    """
    if requested is not None:
        if requested < 1:
            raise UsageError(f"--threads must be at least 1, not {requested}")
        return requested
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        value = os.environ.get(name, "").split(",")[0].strip()
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise UsageError(f"{name} must be a positive integer, not '{os.environ[name]}'")
            return int(value)
    share = max(1, _node_cores() // max(1, ranks_on_node))
    return min(share, available_cores())


def _node_cores(root: Path = Path("/")) -> int:
    """Physical cores of this node that the whole job may use, whatever this process itself is bound to."""
    cpus = set(range(os.cpu_count() or 1))
    for folder in _cgroup_folders("cpuset", root):
        listed = _read(folder / "cpuset.cpus.effective") or _read(folder / "cpuset.cpus")
        if listed:
            cpus &= _cpu_list(listed)
    cores = min(_physical(cpus | os.sched_getaffinity(0), root), _cpu_quota(root))
    return max(1, min(cores, _number("SLURM_CPUS_ON_NODE") or cores))


def _physical(cpus: set[int], root: Path = Path("/")) -> int:
    """Number of cores that the logical ``cpus`` belong to."""
    siblings = root / "sys/devices/system/cpu"
    return len({_read(siblings / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def _cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that the cgroups allow on average, rounded up; infinity without a limit."""
    quotas = [float("inf")]
    for folder in _cgroup_folders("cpu", root):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if limit := _read(folder / "cpu.max"):
            quota, period = limit.split()
        if quota.isdecimal() and period.isdecimal():
            quotas.append(ceil(int(quota) / int(period)))
    return min(quotas)


def _cgroup_memory(root: Path = Path("/")) -> list[int]:
    """Bytes left under each memory limit of the cgroups that this process is in."""
    left = []
    for folder in _cgroup_folders("memory", root):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit.isdecimal() or not used.isdecimal() or int(limit) >= 1 << 60:
            continue
        # Version 1 has the whole subtree under total_*; shared memory counts as file pages but cannot be dropped.
        stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        pages = int(stat.get("total_cache", stat.get("file", 0))) - int(stat.get("total_shmem", stat.get("shmem", 0)))
        left.append(int(limit) - int(used) + max(0, pages))
    return left


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Folders of this process's cgroup for ``controller`` (version 2, or 1) and of those that contain it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
            if not (base / "cgroup.controllers").exists():
                continue
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = base / path.lstrip("/")
        return [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return []


def _cpu_list(text: str) -> set[int]:
    """``0-3,8`` as {0, 1, 2, 3, 8}."""
    cpus = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read(path: Path) -> str:
    """The text of a kernel file, stripped; empty where there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(name: str) -> int:
    """The environment variable as an integer; 0 where it is not set or no number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
