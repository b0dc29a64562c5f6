"""What this process may use of its node: cores, memory, threads. Linux; no MPI.

Sources: sched_setaffinity(2), the kernel's cgroup-v1 and cgroup-v2 documents, sysfs cpu topology, the output
environment variables of srun(1) and sbatch(1).
"""

import os
import socket
from pathlib import Path

from llama_hpc.errors import UsageError
from llama_hpc.kernels.cpu.places import ROOT, all_cpus, cgroup_folders, cpu_list, cpu_quota, physical_cores, places, read
from llama_hpc.kernels.cpu.places import num_cpus as available_cores

_MIB = 1 << 20


def hostname() -> str:
    """Name of this node."""
    return socket.gethostname()


def available_memory() -> int:
    """Bytes that the processes of this job may still use on this node, all together.

    The least of what the kernel has free, what the cgroups leave (pages of mapped files can be dropped and do not
    count as used) and what SLURM granted. An allocation of a GPU's memory is not looked at.
    """
    limits = [left for left, _ in memory_limits()]
    granted = _number("SLURM_MEM_PER_NODE")
    if not granted and (per_cpu := _number("SLURM_MEM_PER_CPU")):
        granted = per_cpu * (_number("SLURM_CPUS_ON_NODE") or 1)
    if granted:
        limits.append(granted * _MIB)
    return max(0, min(limits))


def memory_limits(root: Path = ROOT) -> list[tuple[int, int]]:
    """(bytes left, bytes in all) of this node, and of each limited cgroup that this process is in."""
    import psutil

    memory = psutil.virtual_memory()
    return [(memory.available, memory.total), *_cgroup_memory(root)]


def default_threads(ranks_on_node: int, requested: int | None = None) -> int:
    """Threads of this rank: ``requested``, else OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, else its share of the cores.

    Of a list in OMP_NUM_THREADS, which is for nested levels, the first number counts. SLURM may count hardware threads:
    there, and for the share (the cores of the node that the job may use, divided by ``ranks_on_node``), this process's
    affinity is the limit, so that a rank that its launcher bound to cores takes those. OMP_THREAD_LIMIT limits all but
    ``requested``. Raises UsageError for values that are no positive integers.
    """
    if requested is not None:
        if requested < 1:
            raise UsageError(f"--threads must be at least 1, not {requested}")
        return requested
    limit = _threads_of("OMP_THREAD_LIMIT")
    threads = _threads_of("OMP_NUM_THREADS")
    if not threads:
        share = _threads_of("SLURM_CPUS_PER_TASK") or max(1, node_cores() // max(1, ranks_on_node))
        threads = min(share, available_cores())
    return min(threads, limit or threads)


def thread_places(threads: int) -> list[set[int]] | None:
    """The cpus that each of this process's ``threads`` is to be bound to; None where they stay unbound.

    Call it before any thread is bound. Raises UsageError for values of OMP_PROC_BIND and OMP_PLACES that cannot be used.
    """
    try:
        return places(threads)
    except ValueError as error:
        raise UsageError(str(error)) from None


def node_cpus(root: Path = ROOT) -> set[int]:
    """Logical cpus of this node that the whole job may use, whatever this process itself is bound to."""
    cpus = all_cpus(root)
    for folder in cgroup_folders("cpuset", root):
        listed = read(folder / "cpuset.cpus.effective") or read(folder / "cpuset.cpus")
        if listed:
            cpus &= cpu_list(listed)
    return cpus | os.sched_getaffinity(0)


def node_cores(root: Path = ROOT) -> int:
    """Physical cores of this node that the whole job may use: of those cpus, what quota and SLURM allow (at least 1)."""
    cores = min(physical_cores(node_cpus(root), root), cpu_quota(root))
    return max(1, min(cores, _number("SLURM_CPUS_ON_NODE") or cores))


def _cgroup_memory(root: Path = ROOT) -> list[tuple[int, int]]:
    """Bytes left under each memory limit of the cgroups that this process is in, and the limit."""
    left = []
    for folder in cgroup_folders("memory", root):
        limit = read(folder / "memory.max") or read(folder / "memory.limit_in_bytes")
        used = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        if not limit.isdecimal() or not used.isdecimal() or int(limit) >= 1 << 60:
            continue
        # Version 1 has the whole subtree under total_*; shared memory counts as file pages but cannot be dropped.
        stat = dict(line.split() for line in read(folder / "memory.stat").splitlines())
        pages = int(stat.get("total_cache", stat.get("file", 0))) - int(stat.get("total_shmem", stat.get("shmem", 0)))
        left.append((int(limit) - int(used) + max(0, pages), int(limit)))
    return left


def _threads_of(name: str) -> int:
    """The first number of a variable that holds one or a list of them; 0 where it is not set. Raises UsageError."""
    levels = [level.strip() for level in os.environ.get(name, "").split(",")]
    if levels == [""]:
        return 0
    if not all(level.isdecimal() and int(level) for level in levels):
        raise UsageError(f"{name} must be a positive integer, not '{os.environ[name]}'")
    return int(levels[0])


def _number(name: str) -> int:
    """The environment variable as an integer; 0 where it is not set or no number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
