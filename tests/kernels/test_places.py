"""Cores, caches, NUMA nodes and the places of threads, on made-up nodes: what OpenMP 5.2 says of OMP_PLACES and OMP_PROC_BIND."""

import os

import pytest
from node_tree import write_files, write_node

from llama_hpc.kernels.cpu.places import (
    Caches,
    cache_sizes,
    cpu_list,
    cpu_text,
    domains,
    num_cpus,
    numa_nodes,
    physical_cores,
    places,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("OMP_PROC_BIND", "OMP_PLACES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plain(tmp_path):
    """One socket, 16 cores, an L3 for every 4."""
    return write_node(tmp_path, cores=16, l3_cores=4)


@pytest.fixture
def large(tmp_path):
    """Two sockets of two NUMA nodes of four cores of two hardware threads: core c has the cpus c and c + 16."""
    return write_node(tmp_path, sockets=2, nodes=2, cores=4, smt=2)


ALL = set(range(32))


def test_domains_of_a_large_node(large):
    assert numa_nodes(large) == [{4 * n + c + t for c in range(4) for t in (0, 16)} for n in range(4)]
    assert domains("numa_domains", ALL, large) == domains("ll_caches", ALL, large) == numa_nodes(large)
    assert domains("sockets", ALL, large) == [set(range(8)) | set(range(16, 24)), set(range(8, 16)) | set(range(24, 32))]
    assert domains("cores", ALL, large) == [{core, core + 16} for core in range(16)]
    assert domains("threads", ALL, large)[:4] == [{0}, {16}, {1}, {17}]
    assert physical_cores(ALL, large) == 16 and physical_cores({0, 16, 3}, large) == 2


def test_neighbours_are_of_one_numa_node_whatever_the_numbers(tmp_path):
    """Even cpus on one node, odd ones on the other."""
    listed = {"node0": "0,2,4", "node8": "1,3", "node9": ""}
    root = write_files(tmp_path, {f"sys/devices/system/node/{node}/cpulist": cpus for node, cpus in listed.items()})
    assert numa_nodes(root) == [{0, 2, 4}, {1, 3}]
    assert domains("cores", {0, 1, 2, 3, 4}, root) == [{0}, {2}, {4}, {1}, {3}]


def test_caches(large, plain):
    assert cache_sizes(large, 5) == Caches(l1d=48 << 10, l2=2 << 20, l3=32 << 20, l3_cores=4)
    assert cache_sizes(plain, 0).l3_cores == 4


def test_without_sysfs(tmp_path):
    assert cache_sizes(tmp_path, 0) == Caches(32 << 10, 512 << 10, 8 << 20, os.cpu_count())
    assert numa_nodes(tmp_path) == [set(range(os.cpu_count()))]
    for kind in ("ll_caches", "numa_domains", "sockets"):
        assert domains(kind, {1, 5, 7}, tmp_path) == [{1, 5, 7}]
    assert domains("cores", {1, 5, 7}, tmp_path) == [{1}, {5}, {7}]
    assert places(2, "close", mask={1, 5, 7}, root=tmp_path) == [{1}, {5}]


def test_offline_cpus_are_left_out(tmp_path):
    """Hardware threads switched off one by one, and a whole core."""
    root = write_node(tmp_path, cores=4, smt=2, offline=(2, 4, 5, 6, 7))
    assert domains("cores", set(range(8)), root) == [{0}, {1}, {3}]
    assert numa_nodes(root) == [{0, 1, 3}] and cache_sizes(root, 0).l3_cores == 3
    assert places(3, mask=set(range(8)), root=root) == [{0}, {1}, {3}]


def test_this_machine():
    assert 1 <= num_cpus() <= len(os.sched_getaffinity(0))
    l1d, l2, l3, sharing = cache_sizes()
    assert 4096 <= l1d <= l2 <= l3 and 1 <= sharing <= os.cpu_count()
    assert set().union(*numa_nodes()) >= os.sched_getaffinity(0)


def test_num_cpus_counts_cores_of_the_affinity_within_the_quota(large, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 16, 1, 17, 2})
    assert num_cpus(large) == 3
    write_files(large, {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/cgroup.controllers": "cpu",
                        "sys/fs/cgroup/job/cpu.max": "150000 100000"})
    assert num_cpus(large) == 2


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8,10-11", {0, 1, 2, 3, 8, 10, 11}), ("7", {7}), ("", set())])
def test_lists_of_cpus(text, cpus):
    assert cpu_list(text) == cpus and cpu_text(cpus) == text


def test_default_binds_a_thread_to_each_core_that_a_launcher_gave(large):
    """Mask with holes: cores 1, 4 and 9, of the last one only one hardware thread."""
    mask = {1, 17, 4, 20, 25}
    assert places(3, mask=mask, root=large) == [{1, 17}, {4, 20}, {25}]
    assert places(2, mask=mask, root=large) is None
    assert places(4, mask=mask, root=large) is None


SAME = [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}]


@pytest.mark.parametrize("text", [
    "{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}", "{0:4},{4:4},{8:4},{12:4}", "{0:4}:4:4",
    "{3:4:-1}, {4:4}:3:4", " { 0 : 4 } : 4 : 4 ", "{0:5,!4},{4:4}:3:4", "{0:4}:5:4", "{0:4},{1:2},{4:4}:3:4,!{1:2}", "ll_caches",
])
def test_spellings_of_the_same_places(plain, text):
    """The first three are the specification's own example; places beyond the last cpu are dropped."""
    assert places(4, "close", text, set(range(16)), plain) == SAME


@pytest.mark.parametrize(("text", "expected"), [
    ("0,2,4", [{0}, {2}, {4}]), ("2:3", [{2}, {3}, {4}]), ("{0}:3:2", [{0}, {2}, {4}]), ("{4}:3:-2", [{4}, {2}, {0}]),
    ("{5,0:2}", [{0, 1, 5}]), ("cores(3)", [{0}, {1}, {2}]), ("THREADS(2)", [{0}, {1}]), ("sockets", [set(range(16))]),
    ("numa_domains(9)", [set(range(16))]), ("ll_caches(2)", SAME[:2]),
])
def test_places(plain, text, expected):
    assert places(len(expected), None, text, set(range(16)), plain) == expected


def test_places_are_cut_to_the_mask(large):
    mask = {2, 3, 5, 19}
    assert places(2, "true", "{0:4},{4:4},{8:4}", mask, large) == [{2, 3}, {5}]
    assert places(3, "true", "cores", mask, large) == [{2}, {3, 19}, {5}]
    assert places(4, "true", "threads", mask, large) == [{2}, {3}, {19}, {5}]
    assert places(2, "true", "numa_domains", mask, large) == [{2, 3, 19}, {5}]
    with pytest.raises(ValueError, match=r"OMP_PLACES is '\{8:4\}', which has none of the cpus .* \(2-3,5,19\)"):
        places(2, "true", "{8:4}", mask, large)


@pytest.mark.parametrize(("bind", "threads", "expected"), [
    ("close", 3, [0, 1, 2]), ("close", 8, [0, 1, 2, 3, 4, 5, 6, 7]), ("close", 16, [i // 2 for i in range(16)]),
    ("true", 3, [0, 1, 2]), ("TRUE", 2, [0, 1]), ("compact", 3, [0, 1, 2]),
    ("spread", 1, [0]), ("spread", 2, [0, 4]), ("spread", 4, [0, 2, 4, 6]), ("spread", 16, [i // 2 for i in range(16)]),
    ("primary", 3, [0, 0, 0]), ("master", 2, [0, 0]), ("spread,close", 2, [0, 4]), (" close , spread", 2, [0, 1]),
])
def test_policies(tmp_path, bind, threads, expected):
    """Eight places of a core; index of the place of each thread."""
    root = write_node(tmp_path, cores=8)
    assert places(threads, bind, "cores", set(range(8)), root) == [{place} for place in expected]


@pytest.mark.parametrize("bind", ["close", "spread"])
@pytest.mark.parametrize("threads", range(1, 20))
def test_uneven_numbers_of_threads_and_places(tmp_path, bind, threads):
    """What the specification promises: equal runs of consecutive threads, or a place out of each of equal parts."""
    root = write_node(tmp_path, cores=6)
    found = [min(place) for place in places(threads, bind, "cores", set(range(6)), root)]
    assert found == sorted(found) and found[0] == 0
    counts = [found.count(place) for place in range(6)]
    if threads > 6:
        assert all(threads // 6 <= count <= -(-threads // 6) for count in counts)
    elif bind == "close":
        assert found == list(range(threads))
    else:
        parts = [b - a for a, b in zip(found, [*found[1:], 6], strict=True)]
        assert all(6 // threads <= part <= -(-6 // threads) for part in parts)


def test_variables_of_the_environment(plain, monkeypatch):
    mask = set(range(16))
    monkeypatch.setenv("OMP_PLACES", "ll_caches")
    assert places(3, mask=mask, root=plain) == SAME[:3]
    monkeypatch.setenv("OMP_PROC_BIND", "spread")
    assert places(2, mask=mask, root=plain) == [SAME[0], SAME[2]]
    assert places(2, "close", "", mask, plain) == [{0}, {1}]
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert places(2, mask=mask, root=plain) is None
    monkeypatch.setenv("OMP_PLACES", "")
    assert places(16, mask=mask, root=plain) is None
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert places(2, mask=mask, root=plain) == [{0}, {1}]


@pytest.mark.parametrize("text", ["core", "cores()", "cores(0)", "cores(2", "{0:4", "{}", "{0:0}", "{a}", "{0}{1}", "{0},", "0-3",
                                  "{0:2:}", "{{0}}", "-1"])
def test_wrong_places(plain, text):
    with pytest.raises(ValueError, match=r"OMP_PLACES is '.*', but must be one of threads, cores, .* or a list such as"):
        places(2, "true", text, {0, 1}, plain)


@pytest.mark.parametrize("text", ["yes", "close,", "close,far", "true,close", "1"])
def test_wrong_policies(plain, text):
    with pytest.raises(ValueError, match=r"OMP_PROC_BIND is '.*', but must be one of false, true, close, compact, spread"):
        places(2, text, "", {0, 1}, plain)


def test_wrong_places_are_reported_even_when_unbound(plain):
    with pytest.raises(ValueError, match="OMP_PLACES"):
        places(2, "false", "nonsense", {0, 1}, plain)
