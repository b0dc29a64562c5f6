"""Cores, memory and threads: on this machine, and on made-up kernel trees of both cgroup versions."""

import os
import subprocess
import sys

import psutil
import pytest
from node_tree import write_files, write_node

from llama_hpc.errors import UsageError
from llama_hpc.kernels.cpu.places import cpu_quota
from llama_hpc.runtime import topology

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMP_")):
            monkeypatch.delenv(name)


V2 = {
    "proc/self/cgroup": "0::/slurm/job_7/step_0",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu memory",
    "sys/fs/cgroup/slurm/cpu.max": "max 100000",
    "sys/fs/cgroup/slurm/job_7/cpu.max": "250000 100000",
    "sys/fs/cgroup/slurm/job_7/cpuset.cpus.effective": "0-3",
    "sys/fs/cgroup/slurm/job_7/memory.max": 8 * GIB,
    "sys/fs/cgroup/slurm/job_7/memory.current": 5 * GIB,
    "sys/fs/cgroup/slurm/job_7/memory.stat": f"anon {GIB}\nfile {4 * GIB}\nshmem {GIB}",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.current": GIB,
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n0::/",
    "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": 150000,
    "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": 100000,
    "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": 4 * GIB,
    "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": 3 * GIB,
    "sys/fs/cgroup/memory/docker/abc/memory.stat": f"cache {GIB}\ntotal_cache {2 * GIB}\ntotal_shmem {GIB}",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 30 * GIB,
}


@pytest.mark.parametrize(("files", "cpus", "memory"), [(V2, 3, [(6 * GIB, 8 * GIB)]), (V1, 2, [(2 * GIB, 4 * GIB)])])
def test_cgroup_limits(tmp_path, files, cpus, memory):
    root = write_files(tmp_path, files)
    assert cpu_quota(root) == cpus
    assert topology._cgroup_memory(root) == memory


def test_no_cgroup_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path) == float("inf")
    assert topology._cgroup_memory(tmp_path) == []


def test_cores_of_the_job_whatever_this_process_is_bound_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    root = write_node(tmp_path, cores=8, smt=2)
    assert topology.node_cpus(root) == set(range(16)) and topology.node_cores(root) == 8
    write_files(root, {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/cgroup.controllers": "cpuset cpu",
                       "sys/fs/cgroup/job/cpuset.cpus.effective": "0-3,8-11"})
    assert topology.node_cpus(root) == {*range(4), *range(8, 12)} and topology.node_cores(root) == 4
    write_files(root, {"sys/fs/cgroup/job/cpu.max": "300000 100000"})
    assert topology.node_cores(root) == 3
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert topology.node_cores(root) == 2


def test_this_machine():
    assert 1 <= topology.available_cores() <= os.cpu_count()
    assert 0 < topology.available_memory() <= psutil.virtual_memory().total
    assert topology.hostname()


def test_memory_granted_by_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
    assert topology.available_memory() == 64 << 20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "16")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert topology.available_memory() == 32 << 20


@pytest.mark.parametrize(
    ("ranks", "affinity", "threads"), [(1, 16, 16), (4, 16, 4), (4, 1, 1), (5, 16, 3), (32, 16, 1), (2, 4, 4)]
)
def test_threads_are_the_share_of_the_cores(monkeypatch, ranks, affinity, threads):
    monkeypatch.setattr(topology, "node_cores", lambda: 16)
    monkeypatch.setattr(topology, "available_cores", lambda: affinity)
    assert topology.default_threads(ranks) == threads


def test_threads_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(topology, "available_cores", lambda: 8)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert topology.default_threads(1) == 6
    monkeypatch.setenv("OMP_NUM_THREADS", " 12 , 2")
    assert topology.default_threads(1) == 12
    assert topology.default_threads(1, 5) == 5


def test_slurm_may_count_hardware_threads(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    monkeypatch.setattr(topology, "available_cores", lambda: 8)
    assert topology.default_threads(1) == 8


def test_thread_limit(monkeypatch):
    monkeypatch.setattr(topology, "available_cores", lambda: 8)
    monkeypatch.setattr(topology, "node_cores", lambda: 8)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "3")
    assert topology.default_threads(1) == 3 and topology.default_threads(4) == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert topology.default_threads(1) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert topology.default_threads(1) == 3
    assert topology.default_threads(1, 5) == 5


def test_no_threads():
    with pytest.raises(UsageError, match="--threads must be at least 1, not 0"):
        topology.default_threads(1, 0)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "SLURM_CPUS_PER_TASK"])
@pytest.mark.parametrize("value", ["many", "0", "-2", "2.5", "4,", "4,x", "4,0"])
def test_wrong_numbers_of_threads(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} must be a positive integer, not '{value}'"):
        topology.default_threads(1)


def test_wrong_places_are_errors_of_the_user(monkeypatch):
    monkeypatch.setenv("OMP_PROC_BIND", "near")
    with pytest.raises(UsageError, match="OMP_PROC_BIND is 'near', but must be one of"):
        topology.thread_places(2)
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    mask = os.sched_getaffinity(0)
    found = topology.thread_places(len(mask))
    assert len(found) == len(mask) and set().union(*found) == mask


def test_neither_numba_nor_mpi_is_needed():
    """Threads are counted before Numba is told their number, which it reads when it is first imported."""
    program = ("import sys\nfrom llama_hpc.runtime import advice, topology\ntopology.default_threads(1)\n"
               "topology.thread_places(1)\nprint({'numba', 'numpy', 'mpi4py'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
