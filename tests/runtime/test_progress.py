"""Progress without a terminal: few lines, the right numbers, one rank; with a terminal: a bar."""

import contextlib
import os
import pty
import subprocess
import sys
import termios

import pytest

from llama_hpc.runtime import progress
from llama_hpc.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: ``clock[0]`` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(logged):
    return lambda: [record.getMessage() for record in logged]


def test_a_line_every_tenth(clock, lines):
    with Progress(1000, "prompts", "generating") as bar:
        for _ in range(1000):
            clock[0] += 0.5
            bar.update()
    assert len(lines()) <= 50
    assert lines()[0].startswith("generating: ")
    assert "100/1000 prompts (10 %), 2 prompts/s, 7 min 30 s left" in " ".join(lines())
    assert lines()[-1] == "generating: 1000/1000 prompts (100 %), 2 prompts/s"


def test_a_slow_step_is_heard_of_ever_more_rarely(clock, lines):
    with Progress(10**9, "prompts", "generating") as bar:
        for _ in range(24 * 3600):
            clock[0] += 1
            bar.update()
        said = lines()
    assert 100 < len(said) < 24 * 12 + 20
    assert said[0].startswith("generating: 10/1000000000 prompts")


def test_a_fast_step_is_told_in_one_line(clock, lines):
    with Progress(100, "tensors", "loading") as bar:
        for _ in range(100):
            clock[0] += 0.001
            bar.update()
    assert lines() == ["loading: 100/100 tensors (100 %)"]


def test_other_ranks_are_silent(clock, lines):
    with Progress(10, "tensors", "loading", show=False) as bar:
        clock[0] += 100
        bar.update(10)
    assert lines() == []
    assert bar.done == 10


def test_interrupted_step_says_how_far_it_came(clock, lines):
    with pytest.raises(RuntimeError), Progress(10, "tensors", "loading") as bar:
        bar.update(3)
        raise RuntimeError
    assert lines() == ["loading: 3/10 tensors (30 %)"]


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_a_terminal_gets_a_bar():
    code = "from llama_hpc.runtime.progress import Progress\nwith Progress(3, 'tensors', 'loading') as p: p.update(3)"
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=inner, check=True)
    os.close(inner)
    shown = ""
    # A terminal whose other end is closed gives an error at its end.
    with contextlib.suppress(OSError):
        while piece := os.read(outer, 65536):
            shown += piece.decode()
    os.close(outer)
    assert "loading: 100%" in shown and "3/3" in shown
