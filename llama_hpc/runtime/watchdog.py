"""A watchdog in each rank: notices that the rank gets no further, finds out with the others who holds them up, ends the job.

A rank gets further when its steps do (``activity``), and outside of steps when a beat is counted or its stack changes. One that
has not for the limit calls the roll (``roll_call``). It goes on waiting while a rank that it waits for gets further: one that
loads more, or answers longer. Otherwise the lowest rank that stands still says, in one line, where all of them are, names those
that did not even answer, and ends the job. Ranks that nobody waits for are missed too: the roll is called now and then.

Time counts while this process runs: a job that its scheduler suspends, and continues, has not stood still.
"""

import atexit
import faulthandler
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_hpc.errors import LlamaHpcError
from llama_hpc.runtime import activity
from llama_hpc.runtime.abort import end_at_once
from llama_hpc.runtime.roll_call import Call, RollCall
from llama_hpc.runtime.standstill import Process, explain, stacks, state
from llama_hpc.runtime.topology import hostname

_LOG = logging.getLogger(__name__)
_WAITING = str(Path(__file__).resolve().parents[1] / "comm")        # where ranks wait for each other
_TURN = 3.0                     # seconds that a rank leaves to a lower one to end the job


class Watchdog(threading.Thread):
    """Watches the thread that makes it. Making one is collective over ``comm``, which holds the ranks of the job.

    ``limit``: seconds; ``folder``: for roll calls and stacks, made when it is needed; ``cure``: what to do about a hang;
    ``alone``: whether this program is the whole process, so that even one that holds the interpreter's lock may be ended.
    """

    def __init__(self, comm, limit: float, folder: Path, cure: str, alone: bool):
        super().__init__(name="watchdog", daemon=True)
        from mpi4py import MPI
        self.limit, self._cure, self.alone, self._main = limit, cure, alone, threading.get_ident()
        self.rank = MPI.COMM_WORLD.rank
        self.processes: dict[int, Process] = dict(comm.allgather((self.rank, Process(hostname(), os.getpid()))))
        mark = comm.bcast(secrets.token_hex(8))
        self.ranks = set(self.processes)
        if not _shared(comm, folder.parent, mark, len({process.host for process in self.processes.values()})):
            self.ranks = {self.rank}
            self._cure = f"other ranks could not be asked, as {folder.parent} is not shared; {cure}"
        self._roll = RollCall(folder, mark, self.rank)
        self._tick = min(1.0, limit / 20)           # seconds between looks at this rank
        self._look = min(30.0, limit / 20)          # and at the folder
        self._patience = max(2.0, limit / 4)        # in which all answer, on slow file systems too
        self._mark: Hashable = None
        self._still = self._retry = 0.0             # seconds without getting further; when to ask again
        self._looked = self._asked = self._quiet = 0.0      # seconds since this rank looked, has asked, and anybody has
        self._call: Call | None = None
        self._answered: set[Call] = set()
        self._told: set[int] = set()
        self._over = threading.Event()
        self._guard(True)

    def run(self) -> None:
        """Looks again and again, until ``stop``."""
        before = time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            # More has passed where the process was suspended; less than that is a busy machine.
            passed, before = min(now - before, 5 * self._tick), now
            self._watch(passed)
            try:
                self._take_part(passed)
            except OSError as error:
                if self._still >= self.limit:
                    self._end({self.rank: self._state()}, set(), f"other ranks could not be asked: {error}")

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()
        self.join()
        self._guard(False)
        self._roll.clear()

    def _watch(self, passed: float) -> None:
        """Whether this rank got further."""
        task = activity.task()
        mark = None if task is None else (id(task), self._mark_of(task))
        self._still = self._still + passed if mark is not None and mark == self._mark else 0.0
        self._retry = self._retry if self._still else 0.0
        self._mark = mark
        self._guard(task is not None and task.steps is None)

    def _mark_of(self, task: activity.Task) -> Hashable:
        if task.steps is not None:
            return task.steps.mark()
        return activity.beats(), None if task.polls else self._calls()

    def _calls(self) -> tuple[tuple[int, int], ...]:
        """Where the main thread is in its functions, except in those that wait for other ranks."""
        frame, calls = sys._current_frames().get(self._main), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(_WAITING):
                calls = []
            else:
                calls.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return tuple(calls)

    def _guard(self, on: bool) -> None:
        """Outside of steps the main thread may be stuck with the interpreter's lock, as in a page of a file that never comes.
        Then this thread cannot run; when the others had time to say so, one of C shows the stacks and ends the process."""
        if self.alone:
            faulthandler.cancel_dump_traceback_later()
            if on:
                faulthandler.dump_traceback_later(2 * (self.limit + self._patience) + 10, exit=True, file=sys.__stderr__)

    def _take_part(self, passed: float) -> None:
        """Asks others, answers them, and judges. Raises OSError."""
        self._looked, self._asked, self._quiet = (since + passed for since in (self._looked, self._asked, self._quiet))
        if self._call is None and self._must_ask():
            self._call, self._asked = self._roll.ask(), 0.0
        elif self._looked < self._look or (len(self.ranks) == 1 and self._call is None):
            return
        self._looked = 0.0
        calls = self._roll.calls()
        if calls - self._answered:
            self._roll.answer(calls, self._state(), stacks())
            self._quiet = 0.0
        elif self._answered and not calls:
            self._roll.clear()
        self._answered = calls
        if self._call is not None:
            self._judge()

    def _must_ask(self) -> bool:
        """Whether this rank stands still, or nobody has asked for a while; then the lowest rank that works asks first."""
        if self._still >= max(self.limit, self._retry):
            return True
        turn = min(4, sorted(self.ranks).index(self.rank))
        return len(self.ranks) > 1 and activity.task() is not None and self._quiet > self.limit * (1 + turn / 2)

    def _state(self) -> dict[str, Any]:
        return {"still": self._still, "outside": activity.task() is None, **state(self._main)}

    def _judge(self) -> None:
        """What the answers say, as soon as all are there or have had their time."""
        task, stands = activity.task(), self._still >= self.limit
        # Whoever gets further misses any rank, who does not those that it waits for.
        ranks = self.ranks & {self.rank, *task.ranks} if stands and task is not None and task.ranks else self.ranks
        answers = self._roll.answers(self._call, ranks)
        silent = ranks - set(answers)
        if not answers or (silent and self._asked < self._patience):
            return
        moving = [answer["still"] for answer in answers.values() if answer["still"] < self.limit]
        if not stands or moving:
            self._miss(silent - self._told)
            if stands:
                self._wait_for({rank: answer for rank, answer in answers.items() if answer["outside"]})
            self._retry = self._still + max(self._look, self.limit - min(moving, default=0.0))
            self._call = None
            self._roll.withdraw()
        elif self.rank == min(answers) or self._asked > self._patience + _TURN:
            self._end(answers, silent)

    def _miss(self, silent: set[int]) -> None:
        """Work goes on without ranks that do not answer."""
        self._told |= silent
        if silent:
            _LOG.warning("%s", explain({}, {rank: self.processes[rank] for rank in silent}))

    def _wait_for(self, outside: dict[int, dict[str, Any]]) -> None:
        """Nobody can tell whether ranks will ever come that are not in a call of ours."""
        if outside and not self._told & set(outside):
            self._told |= set(outside)
            _LOG.warning("rank %d waits: %s", self.rank, explain(outside, {}))

    def _end(self, answers: dict[int, dict[str, Any]], silent: set[int], more: str = "") -> None:
        """One line, and the end of the job."""
        where = explain(answers, {rank: self.processes[rank] for rank in silent})
        stacks_in = "" if more else f"stacks in {self._roll.folder}/hang-*.txt"
        told = f"no progress for {self.limit:g} s (the hang limit): {where}", more, stacks_in, self._cure
        end_at_once(LlamaHpcError("; ".join(filter(None, told))))


def _shared(comm, folder: Path, mark: str, hosts: int) -> bool:
    """Whether the first rank's files in a folder are seen by all. Collective over ``comm``."""
    if hosts == 1:
        return True
    from mpi4py import MPI
    probe = folder / f".llama-hpc-{mark}"
    if comm.rank == 0:
        with suppress(OSError):
            probe.touch()
    comm.Barrier()
    seen = comm.allreduce(probe.exists(), MPI.LAND)
    if comm.rank == 0:
        with suppress(OSError):
            probe.unlink()
    return seen


_current: Watchdog | None = None


def start(comm, limit: float, folder: Path, cure: str, alone: bool = False) -> Watchdog | None:
    """Starts this process's watchdog, in place of the one that there is; see ``Watchdog``. None for no limit (0).

    Collective over ``comm``.
    """
    global _current
    if _current is not None:
        _current.stop()
    atexit.unregister(_end)
    atexit.register(_end)
    _current = Watchdog(comm, limit, folder, cure, alone) if limit else None
    if _current is not None:
        _current.start()
    return _current


def _end() -> None:
    """The process is about to end. Ranks leave MPI together, when no thread of Python may run any more: SIGALRM ends one of a
    command that waits too long. What a script does before its own end may take any time."""
    if _current is not None:
        _current.stop()
        if _current.alone and len(_current.processes) > 1:
            signal.alarm(round(max(60, _current.limit)))


def forget(ranks: Iterable[int]) -> None:
    """Ranks of the world that are gone, and that nobody waits for any more."""
    if _current is not None:
        # Another set: the watchdog may be going through this one.
        _current.ranks = _current.ranks - set(ranks)
