"""Worker pools: waiting, binding, sharing, and how they end."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from traced_loops import Trace

from llama_hpc.kernels.cpu import workers
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.workers import Pool, WorkDistribution
from llama_hpc.runtime.topology import thread_places


def _workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("member-")]


def test_idle_workers_leave_the_cores_alone(pool):
    """And come back at once when there is work."""
    before = set(_workers())
    trace = Trace(pool(4), WorkDistribution("dynamic", 1), 100).run()
    clocks = [time.pthread_getcpuclockid(worker.ident) for worker in set(_workers()) - before]
    time.sleep(0.2)
    start = [time.clock_gettime(clock) for clock in clocks]
    time.sleep(0.5)
    assert len(clocks) == 3 and max(time.clock_gettime(clock) - s for clock, s in zip(clocks, start, strict=True)) < 0.05
    for _ in range(3):
        time.sleep(0.05)
        trace.run()


def test_a_core_shared_by_two_members_goes_to_the_one_with_work(pool):
    """A member that waits for one without a core gives way, and later tries no longer to spin for long."""
    cpu = min(os.sched_getaffinity(0))
    team = pool(2, bind=[{cpu}, {cpu}])
    program = Program(team)
    traces = [Trace(team, WorkDistribution("static"), 2, program=program) for _ in range(1000)]
    program.run()
    start = time.process_time()
    program.run()
    assert all((trace.hits[:-1] == 2).all() for trace in traces) and team.stats().waits > 500
    # Spinning out every wait would take that long, or more.
    assert time.process_time() - start < 1000 * workers.SPIN_SECONDS


def test_binding(pool):
    """Members have the affinities that they are given; the caller gets its own back."""
    free, before = os.sched_getaffinity(0), set(_workers())
    sets = [{cpu} for cpu in sorted(free)[:2]] * 2
    team = pool(len(sets), bind=sets)
    bound = sorted(set(_workers()) - before, key=lambda worker: worker.name)
    assert [os.sched_getaffinity(0)] + [os.sched_getaffinity(worker.native_id) for worker in bound] == sets
    Trace(team, WorkDistribution("dynamic", 1), 100).run()
    team.close()
    assert os.sched_getaffinity(0) == free and not any(worker.is_alive() for worker in bound)


def test_binding_as_openmp_says(pool, monkeypatch):
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_PLACES", ",".join(f"{{{cpu}}}" for cpu in reversed(cpus)))
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    before = set(_workers())
    pool(2, bind=thread_places(2))
    (worker,) = set(_workers()) - before
    assert os.sched_getaffinity(0) == {cpus[-1]}
    assert os.sched_getaffinity(worker.native_id) == {cpus[-2] if len(cpus) > 1 else cpus[-1]}


def test_a_place_that_does_not_exist_leaves_no_workers():
    free, before = os.sched_getaffinity(0), set(_workers())
    with pytest.raises(OSError):
        Pool(3, bind=[free, free, {4095}])
    assert set(_workers()) == before and os.sched_getaffinity(0) == free


def test_pools_side_by_side_and_closed(pool):
    teams = [pool(threads) for threads in (1, 2, 3)]
    traces = [Trace(team, WorkDistribution("steal", 1), 50) for team in teams]
    for _ in range(20):
        for trace in traces:
            trace.run()
    for team, trace in zip(teams, traces, strict=True):
        team.close()
        team.close()
        with pytest.raises(RuntimeError, match="closed"):
            trace.program.run()


def test_an_unused_pool_ends_its_workers():
    """A program keeps its pool, workers do not."""
    before = set(_workers())
    trace = Trace(Pool(3), WorkDistribution("dynamic", 1), 10)
    gc.collect()
    trace.run()
    ended = set(_workers()) - before
    del trace
    gc.collect()
    for worker in ended:
        worker.join(10)
    assert len(ended) == 2 and not any(worker.is_alive() for worker in ended)


def test_programs_of_several_threads_take_turns(pool):
    team = pool(2)
    traces = [Trace(team, WorkDistribution("dynamic", 1), 200) for _ in range(3)]
    failed = []

    def use(trace):
        try:
            for _ in range(50):
                trace.run()
        except BaseException as error:
            failed.append(error)
    users = [threading.Thread(target=use, args=(trace,)) for trace in traces]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not failed


def test_scratch_grows(pool):
    team = pool(2, scratch_bytes=100)
    team.need_scratch(10)
    team.need_scratch(5000)
    assert all(len(scratch) == 5000 for scratch in team._scratch)
    Trace(team, WorkDistribution("static"), 10).run()


def test_fork_and_the_end_of_the_process():
    """A forked child is told, and ends; a process ends while pools are open, even while another thread runs a program."""
    script = """
        import os, sys, threading, time
        sys.path.insert(0, sys.argv[1])
        from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
        from llama_hpc.kernels.cpu.placement import TOUCH, touch_operation
        from llama_hpc.kernels.cpu.program import Program
        import numpy as np
        pools = [Pool(2), Pool(3)]
        programs, data = [Program(pool) for pool in pools], np.ones(1 << 16, np.int8)
        for program in programs:
            for _ in range(300):
                program.add("touch", touch_operation, TOUCH, ONE_TASK.record(2), data=data, size=data.nbytes, unit=4096)
            program.run()
        child = os.fork()
        if not child:
            try:
                programs[0].run()
            except RuntimeError as error:
                print("refused" if "process" in str(error) else error, flush=True)
            own = Program(Pool(2))
            own.add("touch", touch_operation, TOUCH, ONE_TASK.record(2), data=data, size=data.nbytes, unit=4096)
            print(own.run(), flush=True)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        def keep_running():
            while True:
                programs[1].run()
        threading.Thread(target=keep_running, daemon=True).start()
        time.sleep(0.1)
    """
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), root], capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["refused", "-1", "7"], "")
