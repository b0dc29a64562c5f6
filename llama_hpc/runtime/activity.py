"""What this rank is doing, for its watchdog: a stack of tasks that the main thread keeps, and beats where it gets further."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

HANG_LIMIT = 600.0              # seconds without getting further before a watchdog does something about it


class Stepping(Protocol):
    """What takes many steps; both methods may be called from any thread, at any time."""

    def mark(self) -> Hashable:
        """Something that changes whenever the main thread gets further."""

    def state(self) -> Mapping[str, Any]:
        """Where it is: ``step``, a number that is alike on ranks in the same step, and ``at``, the rest in words."""


@dataclass(frozen=True)
class Task:
    """``what`` is done, in words; ``ranks`` of the world that it waits for at most (None: all of the job); its ``steps``, if it
    takes some; ``polls``: while it waits, it looks again and again, which does not get it further."""

    what: str
    ranks: tuple[int, ...] | None = None
    steps: Stepping | None = None
    polls: bool = False


_tasks: list[Task] = []
_beats = 0


@contextmanager
def doing(what: str, ranks: tuple[int, ...] | None = None, steps: Stepping | None = None, polls: bool = False) -> Iterator[None]:
    """A block, or with ``@doing(…)`` a function, of the main thread that is a task; see ``Task``. Not for what is done often."""
    _tasks.append(Task(what, ranks, steps, polls))
    try:
        yield
    finally:
        _tasks.pop()


def beat() -> None:
    """This rank gets further, in a task in which nothing else may show that for long."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often ``beat`` was called."""
    return _beats


def task() -> Task | None:
    """The innermost task; None outside of all. From any thread."""
    try:
        return _tasks[-1]
    except IndexError:
        return None
