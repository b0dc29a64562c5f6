"""The watchdog: what is a hang and what is not, under mpirun, and what it says."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mpi_jobs
import psutil
import pytest

from llama_hpc.runtime.standstill import Process, explain

LIMIT = 1.5

# Each case runs on every rank under a watchdog.
PROGRAM = f"""
import ctypes, sys, time
from pathlib import Path
from llama_hpc.runtime.abort import agreed, guarded
from llama_hpc.runtime.activity import beat, doing
from llama_hpc.runtime.launch import world
from llama_hpc.runtime.watchdog import start

class Steps:
    def __init__(self, step):
        self.step = step
    def mark(self):
        return self.step
    def state(self):
        return {{"step": self.step, "what": "compute, layer 5, o"}}

def waiting_for_a_rank_that_counts(comm):
    with agreed(comm, "loading the weights"):
        for _ in range(8 * comm.rank):
            time.sleep(0.25)
            beat()

def waiting_for_a_rank_whose_stack_changes(comm):
    def deeper(seconds):
        time.sleep(0.05)
        if seconds > 0:
            deeper(seconds - 0.05)
    with agreed(comm, "reading the prompts"):
        deeper(4.0 if comm.rank else 0)

def a_rank_that_does_nothing(comm):
    with agreed(comm, "loading the weights"):
        time.sleep(60 if comm.rank else 0)

def different_steps(comm):
    with doing("steps", steps=Steps(17 + comm.rank)):
        time.sleep(60)

def looking_again_and_again(comm):
    with doing("waiting for other replicas", polls=True):
        while True:
            time.sleep(0.01)

def the_interpreters_lock(comm):
    with agreed(comm, "loading the weights"):
        if comm.rank or comm.size == 1:
            ctypes.PyDLL(None).sleep(60)

def steps_that_go_on(comm):
    steps = Steps(0)
    comm.Barrier()
    Path("begun").touch()
    with doing("steps", steps=steps):
        while steps.step < 5:
            for _ in range(10):
                time.sleep(0.1)
            steps.step += 1
    comm.Barrier()

def main():
    comm = world()
    start(comm, {LIMIT}, Path("progress"), "--resume goes on", alone=True)
    with doing("run"):
        globals()[sys.argv[1]](comm)

sys.exit(guarded(main))
"""
HANGS = ("a_rank_that_does_nothing", "different_steps", "looking_again_and_again", "the_interpreters_lock")
FINE = ("waiting_for_a_rank_that_counts", "waiting_for_a_rank_whose_stack_changes")
ALONE, SUSPENDED = "the_interpreters_lock alone", "steps_that_go_on"


def suspended(folder):
    """Two ranks that are stopped for a while."""
    command = [str(Path(sys.executable).with_name("mpirun")), "-n", "2", sys.executable, "-c", PROGRAM, SUSPENDED]
    with subprocess.Popen(command, env=mpi_jobs.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, cwd=folder) as job:
        while not (folder / "begun").exists() and job.poll() is None:
            time.sleep(0.05)
        # In the midst of a step.
        time.sleep(0.4)
        ranks = [process for process in psutil.Process(job.pid).children(recursive=True) if SUSPENDED in process.cmdline()]
        for number, seconds in ((signal.SIGSTOP, 2 * LIMIT), (signal.SIGCONT, 0)):
            for process in ranks:
                os.kill(process.pid, number)
            time.sleep(seconds)
        output, _ = job.communicate(timeout=30)
    return len(ranks), job.returncode, output


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All cases, several at a time, as they do little but wait: (the job, its folder)."""
    def run(case, folder):
        if case == SUSPENDED:
            return suspended(folder), folder
        ranks = 1 if case == ALONE else 3
        return mpi_jobs.mpirun(ranks, ["-c", PROGRAM, case.split()[0]], timeout=60, cwd=folder), folder
    with ThreadPoolExecutor(4) as pool:
        yield {case: pool.submit(run, case, tmp_path_factory.mktemp("job")) for case in (ALONE, SUSPENDED, *HANGS, *FINE)}


def line_of(jobs, case):
    """What a job that hung said of it, in one line; it is over with exit code 1, and has left stacks."""
    job, folder = jobs[case].result()
    (line,) = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert job.returncode == 1 and "Traceback" not in job.stderr
    assert re.search(rf"llama-hpc: error: no progress for {LIMIT} s \(the hang limit\): .*; stacks in progress/hang-\*.txt; "
                     r"--resume goes on \[rank \d", line), line
    return line, folder / "progress"


@pytest.mark.parametrize("case", FINE)
def test_who_waits_for_a_rank_that_gets_further_goes_on(jobs, case):
    job, folder = jobs[case].result()
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")
    assert list(folder.iterdir()) == []


def test_a_rank_that_stands_still_is_shown_with_its_stack(jobs):
    line, folder = line_of(jobs, "a_rank_that_does_nothing")
    assert "rank 0: loading the weights [_come_together, runtime/abort.py:" in line and "ranks 1-2: loading the weights" in line
    stack = (folder / "hang-1.txt").read_text()
    assert 'in a_rank_that_does_nothing' in stack and "thread MainThread:" in stack


def test_ranks_in_different_steps_are_named(jobs):
    line, _ = line_of(jobs, "different_steps")
    for rank in range(3):
        assert f"rank {rank}: step {17 + rank}, compute, layer 5, o" in line
    assert "ranks are in different steps (17, 18, 19)" in line


def test_looking_again_and_again_is_no_progress(jobs):
    line, _ = line_of(jobs, "looking_again_and_again")
    assert "ranks 0-2: waiting for other replicas" in line


def test_a_rank_that_cannot_answer_is_named(jobs):
    line, _ = line_of(jobs, "the_interpreters_lock")
    for rank in (1, 2):
        assert re.search(rf"rank {rank} \(process \d+ on \S+\) does not answer: frozen or gone", line)


def test_a_rank_alone_with_the_interpreters_lock_ends_with_its_stack(jobs):
    job, _ = jobs[ALONE].result()
    assert job.returncode == 1 and "in the_interpreters_lock" in job.stderr and "Timeout" in job.stderr


def test_a_job_that_was_suspended_has_not_stood_still(jobs):
    assert jobs[SUSPENDED].result()[0] == (2, 0, "")


def test_ranks_at_the_same_place_are_told_together():
    def at(step):
        return {"step": step, "what": "receive from rank 0", "call": "take, comm/pipeline.py:9"}
    text = explain({rank: at(7) for rank in (1, 2, 3, 5)}, {4: Process("elsewhere", 77)})
    assert text == ("rank 4 (process 77 on elsewhere) does not answer: frozen or gone; "
                    "ranks 1-3, 5: step 7, receive from rank 0 [take, comm/pipeline.py:9]")
    assert explain({rank: at(rank) for rank in range(20)}, {}).count("receive") == 6
