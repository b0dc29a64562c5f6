"""``llama-hpc bench comm``: every exchange is checked, and timed inside a node and between nodes."""

import json

import h5py
import pytest

from llama_hpc.cli.bench_ranks import OPERATIONS
from llama_hpc.kernels.cpu import window_probes

BUS = {"allreduce": lambda n: 2 * (n - 1) / n, "allreduce-bits": lambda n: 2 * (n - 1) / n, "allgather": lambda n: (n - 1) / n,
       "alltoall": lambda n: (n - 1) / n, "pingpong": lambda n: 1, "both-ways": lambda n: 2, "window-copy": lambda n: 1,
       "window-sum": lambda n: 2 * (n - 1) / n}
PAIRS = ("pingpong", "both-ways")
# Ranks 0 and 1, 2 and 3, … as if they were nodes.
PAIRED = """
import argparse
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.bench.comm import measure_exchanges
from llama_hpc.bench.exchanges import OPERATIONS
from llama_hpc.bench.report import Report
from llama_hpc.runtime.launch import world
comm = world()
report = Report("bench") if comm.rank == 0 else None
args = argparse.Namespace(operations=list(OPERATIONS), sizes=[64], rounds=1)
measure_exchanges(args, report, comm, comm.Split(comm.rank // 2, comm.rank))
if report:
    report.write()
"""
# The library adds up one number too many, on one rank.
BROKEN = """
import sys
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.bench import exchanges
from llama_hpc.cli.main import main
make = exchanges.OPERATIONS["allreduce"].make
def broken(comm, words):
    found = make(comm, words)
    found._expected[-1] += comm.rank == 1
    return found
object.__setattr__(exchanges.OPERATIONS["allreduce"], "make", broken)
sys.exit(main(["bench", "comm", "--operations", "pingpong", "allreduce", "--sizes", "64", "--rounds", "1"]))
"""


def check(result):
    assert result["microseconds"] > 0 and result["repetitions"] >= 1
    assert result["gigabytes_per_second"] * result["microseconds"] * 1e3 == pytest.approx(result["bytes"])
    bus = result["gigabytes_per_second"] * BUS[result["operation"]](result["ranks"])
    assert result["bus_gigabytes_per_second"] == pytest.approx(bus)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_table_and_files(command, tmp_path, ranks):
    words = ["bench", "comm", "--sizes", "8", "4K", "--rounds", "2", "--output", "figures"]
    job = command(ranks, words, timeout=120, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    lines = job.stdout.splitlines()
    assert lines[0].startswith(f"{ranks} ranks on 1 node, ") and lines[1].split()[:4] == ["place", "operation", "ranks", "bytes"]
    report = json.loads((tmp_path / "figures.json").read_text())
    results = report["exchanges"]
    assert (report["ranks"], report["nodes"]) == (ranks, 1)
    assert len(lines) == 2 + len(results) + 1
    assert [r["operation"] for r in results] == [name for name in OPERATIONS for _ in (8, 4096)]
    for result in results:
        check(result)
        assert result["place"] == "node" and result["ranks"] == (2 if result["operation"] in PAIRS else ranks)
    # Shares are whole numbers.
    whole = {size: -(-size // (8 * ranks)) * 8 * ranks for size in (8, 4096)}
    for result, size in zip(results, (8, 4096) * len(OPERATIONS), strict=True):
        assert result["bytes"] == (whole[size] if result["operation"] in ("allgather", "alltoall") else size)
    with h5py.File(tmp_path / "figures.h5") as file:
        assert list(file) == ["exchanges"] and file.attrs["ranks"] == ranks
        rows = file["exchanges"][:]
    assert rows.dtype.names == tuple(results[0]) and rows["microseconds"].tolist() == [r["microseconds"] for r in results]


def test_mpich(mpirun, tmp_path):
    job = mpirun(2, ["-m", "llama_hpc", "bench", "comm", "--sizes", "4K", "--rounds", "1"], mpi="mpich", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert len(json.loads((tmp_path / "benchmark_parallel_results.json").read_text())["exchanges"]) == len(OPERATIONS)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_between_nodes(mpirun, tmp_path, ranks):
    job = mpirun(ranks, ["-c", PAIRED], timeout=120, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    results = json.loads((tmp_path / "bench.json").read_text())["exchanges"]
    between = [name for name in OPERATIONS if not name.startswith("window")] if ranks > 2 else []
    assert [(r["place"], r["operation"]) for r in results] == [*(("node", name) for name in OPERATIONS),
                                                              *(("nodes", name) for name in between)]
    for result in results:
        check(result)
        nodes = -(-ranks // 2)
        assert result["ranks"] == (nodes if result["place"] == "nodes" and result["operation"] not in PAIRS else 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_wrong_numbers_are_not_timed(mpirun, tmp_path, ranks):
    job = mpirun(ranks, ["-c", BROKEN], timeout=60, cwd=tmp_path)
    assert job.returncode == 1
    lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert len(lines) == 1 and "allreduce of 64 bytes between" in lines[0] and "other numbers than were sent" in lines[0]
    assert not list(tmp_path.iterdir())


def test_parts_of_a_window_are_whole_lines():
    assert [window_probes.part_bytes(words) for words in (1, 4, 5)] == [192, 192, 256]
