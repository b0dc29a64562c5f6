"""Counters in a file: what several processes add is all there, and one that dies leaves the lock to the others."""

import signal
import subprocess
import sys

import pytest

from llama_hpc.comm.counter import FileCounters
from llama_hpc.errors import ResultsError

_ADD = """
import sys
from pathlib import Path
from llama_hpc.comm.counter import FileCounters
counters = FileCounters(Path(sys.argv[1]), None)
for _ in range(300):
    counters.add(1, 1)
"""
_DIE = """
import fcntl, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(file, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_count_together(tmp_path):
    path = tmp_path / "counters"
    counters = FileCounters(path, None)
    counters.set(1, 5)
    others = [subprocess.Popen([sys.executable, "-c", _ADD, path]) for _ in range(3)]
    assert [other.wait(60) for other in others] == [0, 0, 0]
    assert counters.read(1) == 905 and counters.read(0) == 0
    assert counters.add(1, 2) == 905 and FileCounters(path, None).read(1) == 907


def test_who_dies_holds_nothing(tmp_path):
    path = tmp_path / "counters"
    counters = FileCounters(path, None)
    assert subprocess.run([sys.executable, "-c", _DIE, path], timeout=60).returncode == -signal.SIGKILL
    assert counters.add(0, 1) == 0 and counters.read(0) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultsError, match="No such file or directory"):
        FileCounters(tmp_path / "none" / "counters", None)
