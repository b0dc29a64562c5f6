"""Where a rank stands, and where all of them do, in words."""

import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_hpc.runtime import activity
from llama_hpc.runtime.topology import hostname

_PACKAGE = Path(__file__).resolve().parents[1]
_MOST = 6                       # places of which one line tells
# Of a process, as psutil names them.
_CONDITIONS = {"stopped": "is stopped by a signal", "tracing-stop": "is held by a debugger",
               "disk-sleep": "waits for a file system", "zombie": "has ended"}


class Process(NamedTuple):
    """A rank's own."""

    host: str
    number: int

    def condition(self) -> str:
        """What is known of one that does not answer; more on its own host."""
        known = "does not answer: frozen or gone"
        if self.host == hostname():
            import psutil
            try:
                known = _CONDITIONS.get(psutil.Process(self.number).status(), known)
            except psutil.NoSuchProcess:
                known = "has ended"
        return f"(process {self.number} on {self.host}) {known}"


def state(main_thread: int) -> dict[str, Any]:
    """Where this rank is, from any of its threads: ``what`` it does and the ``call`` in which it is, in words, and ``step``
    (None outside of steps)."""
    task = activity.task()
    found = {"what": "in the script, outside of calls" if task is None else task.what, "step": None, "call": ""}
    if task is not None:
        found["call"] = _innermost(main_thread)
        if task.steps is not None:
            found |= task.steps.state()
    return found


def stacks() -> str:
    """Of all threads but the one that asks, the innermost call last."""
    names, parts = {thread.ident: thread.name for thread in threading.enumerate()}, []
    for number, frame in sys._current_frames().items():
        if number == threading.get_ident():
            continue
        parts += [f"thread {names.get(number, number)}:\n", *traceback.format_stack(frame), "\n"]
    return "".join(parts)


def _innermost(main_thread: int) -> str:
    """The innermost function of this package."""
    frame = sys._current_frames().get(main_thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{frame.f_code.co_name}, {path.relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def explain(states: Mapping[int, Mapping[str, Any]], silent: Mapping[int, Process]) -> str:
    """Where ranks stand, by rank; first those that are ``silent``, then those at the same place together."""
    parts = [f"rank {rank} {silent[rank].condition()}" for rank in sorted(silent)]
    together: dict[str, list[int]] = {}
    for rank in sorted(states):
        at = states[rank]
        step = "" if at["step"] is None else f"step {at['step']}, "
        call = f" [{at['call']}]" if at["call"] else ""
        together.setdefault(f"{step}{at['what']}{call}", []).append(rank)
    parts += [f"{_ranks(ranks)}: {text}" for text, ranks in together.items()]
    if len(parts) > _MOST:
        parts[_MOST:] = [f"{len(parts) - _MOST} more"]
    steps = sorted({at["step"] for at in states.values()} - {None})
    if len(steps) > 1:
        parts.append(f"ranks are in different steps ({', '.join(map(str, steps))})")
    return "; ".join(parts)


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if text.isdecimal() else 's'} {text}"
