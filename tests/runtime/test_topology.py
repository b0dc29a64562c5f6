"""Cores, memory and threads: on this machine, and on made-up kernel trees of both cgroup versions."""

import os

import psutil
import pytest

from llama_hpc.errors import UsageError
from llama_hpc.runtime import topology

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name == "OMP_NUM_THREADS":
            monkeypatch.delenv(name)


@pytest.fixture
def tree(tmp_path):
    """Makes files of a kernel tree under a temporary root; returns the root."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


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


@pytest.mark.parametrize(("files", "cpus", "memory"), [(V2, 3, [6 * GIB]), (V1, 2, [2 * GIB])])
def test_cgroup_limits(tree, files, cpus, memory):
    root = tree(files)
    assert topology._cpu_quota(root) == cpus
    assert topology._cgroup_memory(root) == memory


def test_no_cgroup_is_no_limit(tmp_path):
    assert topology._cpu_quota(tmp_path) == float("inf")
    assert topology._cgroup_memory(tmp_path) == []


def test_hyperthreads_of_one_core_count_once(tree):
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    topo = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = tree({topo.format(cpu): text for cpu, text in siblings.items()})
    assert topology._physical({0, 4}, root) == 1
    assert topology._physical({0, 1, 4, 5}, root) == 2


def test_cpu_list():
    assert topology._cpu_list("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11}


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
    monkeypatch.setattr(topology, "_node_cores", lambda: 16)
    monkeypatch.setattr(topology, "available_cores", lambda: affinity)
    assert topology.default_threads(ranks) == threads


def test_threads_that_were_asked_for(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert topology.default_threads(1) == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert topology.default_threads(1) == 3
    assert topology.default_threads(1, 5) == 5


def test_wrong_numbers_of_threads(monkeypatch):
    with pytest.raises(UsageError, match="--threads must be at least 1, not 0"):
        topology.default_threads(1, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UsageError, match="OMP_NUM_THREADS must be a positive integer, not 'many'"):
        topology.default_threads(1)
