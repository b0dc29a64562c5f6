"""The launch table and its warnings: made-up jobs on made-up nodes, and real ranks."""

import os
import re
import socket

import pytest
from node_tree import write_node

from llama_hpc.runtime import binding
from llama_hpc.runtime.binding import Place, launch_table, launch_warnings

OPENMPI = "Open MPI v5.0.8, package: …"


def rank(cpus, threads=None, host="a", numa=(0,), bound=None, node_cores=8, whole=False):
    """A rank on cpus that are cores."""
    cpus = frozenset(cpus)
    threads = len(cpus) if threads is None else threads
    return Place(host, threads, cpus, cpus, frozenset(numa), threads == len(cpus) if bound is None else bound, node_cores, whole)


def rows(places):
    """The cells of each line, by title."""
    titles, *lines = launch_table(places)
    starts = [titles.index(title) for title in ("ranks", "host", "threads", "cores", "cpus", "NUMA", "device")]
    return [re.split(r"  +", line.strip()) for line in lines], starts


def test_ranks_with_as_much_each_share_a_line():
    places = [rank({0, 1}), rank({2, 3}), rank({4, 5}, numa=(1,)), rank({6}, numa=(1,), threads=1)]
    (first, second), _ = rows(places)
    assert first == ["0-2", "a", "2", "2", "0-5", "0-1", "cpu"]
    assert second == ["3", "a", "1", "1", "6", "1", "cpu"]


def test_ranks_dealt_to_hosts_in_turn_are_listed_by_host():
    places = [rank({n // 2}, host="ab"[n % 2]) for n in range(8)]
    assert [line[:2] for line in rows(places)[0]] == [["0,2,4,6", "a"], ["1,3,5,7", "b"]]


def test_hundreds_of_ranks_stay_readable():
    """Equal hosts share a line, others keep their own."""
    places = [rank({core}, host=f"n{node:03}", node_cores=128, numa=(core // 16,)) for node in range(100) for core in range(128)]
    places += [rank(range(64), host="n100", node_cores=128, numa=(0, 1, 2, 3))]
    lines, _ = rows(places)
    assert lines == [["0-12799", "n000 … n099 (100 hosts)", "1", "1", "0-127", "0-7", "cpu"],
                     ["12800", "n100", "64", "64", "0-63", "0-3", "cpu"]]
    ragged = [rank({core}, host=f"n{node}") for node in range(30) for core in range(1 + node % 2)]
    assert len(rows(ragged)[0]) == 30 and max(map(len, launch_table(places))) < 100


def test_long_lists_are_cut():
    (line,) = rows([rank({2 * n for n in range(64)}, node_cores=128)])[0]
    assert line[4].startswith("0,2,4,") and line[4].endswith(",…") and len(line[4]) <= 40


BOUND = [rank({0, 1}), rank({2, 3})]
FAULTS = {
    "nothing": (BOUND, []),
    "alone": ([rank(range(8), whole=True)], []),
    "alone and unbound on several NUMA nodes": (
        [rank(range(8), 4, whole=True, numa=(0, 1), bound=False)], ["rank 0 on a may move over 8 cores and 2 NUMA nodes: let"]),
    "unbound": ([rank(range(8), 4, whole=True, bound=False)] * 2, ["ranks 0-1 on a may move over 8 cores: let the launcher"]),
    "bound to a NUMA node each": (
        [rank(range(4), 2, numa=(0,))] * 2 + [rank(range(4, 8), 2, numa=(1,))] * 2, []),
    "unbound, with places of their own": ([rank(range(4), 4, bound=True), rank(range(4, 8), 4, bound=True)], []),
    "shared cores": ([rank({0, 1}), rank({1, 2}), rank({4})], ["4 threads of ranks 0-1 on a share 3 cores: let the"]),
    "threads on one core": ([rank({0}, 4), rank({1}, 4)], ["4 threads of rank 0 on a share 1 core (and 1 more like this): let"]),
    "too many ranks": ([rank(range(8), 4, whole=True, bound=False)] * 3,
                       ["a has 8 cores for 12 threads of 3 ranks: start fewer ranks on a node, or give"]),
    "too many on several nodes": (
        [rank({0}, 1, host=f"n{n // 3}", node_cores=2) for n in range(12)],
        ["n0 has 2 cores for 3 threads of 3 ranks (and 3 more like this): start fewer"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_binding_are_one_line_each(case):
    places, expected = FAULTS[case]
    found = launch_warnings(places, OPENMPI, {})
    assert len(found) == len(expected) and all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
LAUNCHERS = {
    "srun": (SRUN, OPENMPI, []),
    "srun without PMIx": ({"SLURM_PROCID": "0"}, OPENMPI, ["srun started Open MPI without PMIx"]),
    "MPICH needs none": ({"SLURM_PROCID": "0", "PMI_RANK": "0"}, "MPICH Version: 5.0.2", []),
    "cpus per task lost": (SRUN | {"SLURM_CPUS_PER_TASK": "4"}, OPENMPI,
                           ["srun gave each rank 2 of the 4 cpus per task that the job asked for"]),
    "cpus per task exported": (SRUN | {"SLURM_CPUS_PER_TASK": "4", "SRUN_CPUS_PER_TASK": "4"}, OPENMPI, []),
    "cpus per task given": (SRUN | {"SLURM_CPUS_PER_TASK": "2"}, OPENMPI, []),
    "mpirun inside of sbatch": ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "4", "OMPI_COMM_WORLD_RANK": "0"}, OPENMPI, []),
    "mpiexec inside of sbatch": ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "4", "MPI_LOCALNRANKS": "2"}, "MPICH", []),
    "no scheduler": ({"SLURM_CPUS_PER_TASK": "4"}, OPENMPI, []),
}


@pytest.mark.parametrize("case", LAUNCHERS)
def test_faults_of_the_launcher_are_seen_in_the_environment(case):
    environ, library, expected = LAUNCHERS[case]
    found = launch_warnings(BOUND, library, environ)
    assert len(found) == len(expected) and all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_the_place_of_a_rank(tmp_path, monkeypatch):
    """Two hardware threads a core, four NUMA nodes: a rank on the second threads of cores of two of these."""
    root = write_node(tmp_path, sockets=2, nodes=2, cores=4, smt=2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 19, 20, 21})
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    place = binding.own_place(2, None, root)
    assert (place.host, place.threads, place.device.text) == (socket.gethostname(), 2, "cpu")
    assert place.cpus == {3, 4, 19, 20, 21} and place.cores == {3, 4, 5} and place.numa == {0, 1}
    assert not place.bound and not place.whole and place.node_cores == 16
    placed = binding.own_place(2, [{19}, {3}], root)
    assert placed.bound and placed.cpus == {3, 19} and placed.cores == {3} and placed.numa == {0}
