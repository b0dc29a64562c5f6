"""Errors under mpirun: one line of ours, the exit code of the kind, and nobody left waiting."""

import subprocess
import sys
import time

import pytest

from llama_hpc.errors import CheckpointError, LlamaHpcError, UsageError
from llama_hpc.runtime.abort import guarded

# Each case runs on every rank; `bad` is the rank that fails where one fails alone, the last one of the world.
PROGRAM = """
import sys, time
from llama_hpc.errors import *
from llama_hpc.runtime.abort import agreed, guarded, on_first
from llama_hpc.runtime.launch import world

class Broken(ValueError):
    def __reduce__(self):
        raise TypeError("cannot be pickled")

def shared(comm, bad):
    raise UsageError("the grid does not fit", collective=True)

def alone(comm, bad):
    if comm.rank == bad:
        raise CheckpointError("the tensor is truncated")
    comm.Barrier()

def everyone_alone(comm, bad):
    raise CheckpointError("the tensor is truncated")

def bug(comm, bad):
    if comm.rank == bad:
        [][1]
    comm.Barrier()

def memory(comm, bad):
    if comm.rank == bad:
        raise MemoryError
    comm.Barrier()

def missing_file(comm, bad):
    if comm.rank == bad:
        open("/nowhere/at/all")
    comm.Barrier()

def interrupted(comm, bad):
    if comm.rank == bad:
        raise KeyboardInterrupt
    comm.Barrier()

def exited(comm, bad):
    if comm.rank == bad:
        sys.exit(2)
    comm.Barrier()

def agreed_on(comm, bad):
    with agreed(comm, "reading the weights"):
        if comm.rank == bad:
            raise CheckpointError("the tensor is truncated")
    comm.Barrier()

def others_take_long(comm, bad):
    with agreed(comm, "reading the weights"):
        if comm.rank == bad:
            raise CheckpointError("the tensor is truncated")
        time.sleep(60 if comm.size > 1 else 0)

def agreed_on_by_two(comm, bad):
    with agreed(comm, "reading the weights"):
        if comm.rank >= bad - 1:
            raise UsageError(f"from rank {comm.rank}")

def agreed_bug(comm, bad):
    with agreed(comm, "reading the weights"):
        if comm.rank == bad:
            raise Broken("odd value")

def agreed_in_part(comm, bad):
    part = comm.Split(color=comm.rank == 0)
    if comm.rank > 0 or comm.size == 1:
        with agreed(part, "reading the weights"):
            raise UsageError(f"from rank {comm.rank}")
    comm.Barrier()

def first_fails(comm, bad):
    def prompts(path):
        raise UsageError(f"{path}: line 3 is not JSON")
    on_first(comm, prompts, "p.jsonl")

def fine(comm, bad):
    with agreed(comm, "nothing"):
        pass
    assert on_first(comm, lambda x: (comm.rank, x), "payload") == (0, "payload")

def main():
    comm = world()
    globals()[sys.argv[1]](comm, comm.size - 1)

sys.exit(guarded(main))
"""
BAD = "the last rank"
CASES = {
    "shared": (2, "error: the grid does not fit", None),
    "alone": (1, "error: the tensor is truncated", BAD),
    "everyone_alone": (1, "error: the tensor is truncated", 0),
    "bug": (1, "internal error on rank {bad} (", BAD),
    "memory": (1, "error: out of memory on rank {bad} (", BAD),
    "missing_file": (1, "error: /nowhere/at/all: No such file or directory on rank {bad} (", BAD),
    "interrupted": (130, "error: interrupted", BAD),
    "exited": (2, "error: left early", BAD),
    "agreed_on": (1, "error: the tensor is truncated", None),
    "others_take_long": (1, "error: the tensor is truncated", BAD),
    "agreed_on_by_two": (2, "error: from rank {before}", None),
    "agreed_bug": (1, "internal error while reading the weights on rank {bad} (", None),
    "agreed_in_part": (2, "error: from rank {one}", "one"),
    "first_fails": (2, "error: p.jsonl: line 3 is not JSON", None),
}


def lines_of_ours(stderr):
    return [line for line in stderr.splitlines() if "llama-hpc:" in line]


def check(job, n, case):
    code, text, speaker = CASES[case]
    ranks = {"bad": n - 1, "before": max(0, n - 2), "one": min(1, n - 1)}
    assert len(lines_of_ours(job.stderr)) == 1, job.stderr
    line = lines_of_ours(job.stderr)[0]
    assert line.startswith("llama-hpc: " + text.format(**ranks))
    # A rank that fails alone says who it is; what all ranks share needs no name.
    if speaker is not None and n > 1:
        rank = {BAD: n - 1, "one": 1}.get(speaker, speaker)
        assert f"rank {rank} (" in line
    assert "Traceback" not in job.stderr
    assert job.returncode == code


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_the_exit_code(mpirun, case, tmp_path):
    start = time.monotonic()
    check(mpirun(3, ["-c", PROGRAM, case], timeout=20, cwd=tmp_path), 3, case)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("case", ["shared", "alone", "everyone_alone", "agreed_on", "agreed_in_part"])
@pytest.mark.parametrize("n", [1, 5])
def test_at_other_sizes(mpirun, case, n):
    check(mpirun(n, ["-c", PROGRAM, case], timeout=20), n, case)


@pytest.mark.parametrize("case", ["shared", "alone", "everyone_alone", "agreed_on", "agreed_in_part", "interrupted",
                                  "others_take_long"])
def test_under_mpich(mpirun, case):
    check(mpirun(3, ["-c", PROGRAM, case], mpi="mpich", timeout=20), 3, case)


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_said_when_nothing_fails(mpirun, n):
    job = mpirun(n, ["-c", PROGRAM, "fine"])
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")


def test_debug_shows_the_traceback(mpirun):
    job = mpirun(2, ["-c", PROGRAM, "bug"], env={"LLAMA_HPC_DEBUG": "1"})
    assert "IndexError" in job.stderr and job.stderr.count("Traceback") >= 1
    assert len(lines_of_ours(job.stderr)) == 1


def fail_with(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("error", [UsageError("a wrong option"), CheckpointError("a broken file"), LlamaHpcError("x")])
def test_without_mpi_prints_and_returns_the_code(error, capsys, monkeypatch):
    monkeypatch.setattr("llama_hpc.runtime.launch._LAUNCHERS", ())
    assert guarded(fail_with(error)) == type(error).exit_code
    assert capsys.readouterr().err == f"llama-hpc: error: {error}\n"


def test_result_is_the_exit_code():
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3


def test_a_bug_leaves_its_traceback_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(fail_with(ValueError("two\nlines"))) == 1
    line = capsys.readouterr().err
    assert line.startswith("llama-hpc: internal error on rank 0 (") and line.count("\n") == 1
    assert "ValueError: two lines" in line
    (kept,) = tmp_path.iterdir()
    assert str(kept) in line
    assert "fail_with" in kept.read_text() or "function" in kept.read_text()


def test_a_reader_that_goes_away_is_no_error():
    code = "from llama_hpc.runtime.abort import guarded\n" \
        "guarded(lambda: [print('line', flush=True) for _ in range(100000)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
