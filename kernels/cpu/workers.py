"""Worker pools: threads that run the same program, share its loops by a schedule, and wait without taking a core from others.

A pool has ``threads`` members; the caller of ``Program.run`` is the first. The others are Python threads that stay in compiled
code without the interpreter's lock. Names follow OpenMP's.
"""

import atexit
import os
import threading
import weakref
from dataclasses import dataclass
from math import isqrt

import numpy as np

from . import places, team
from .memory import address, aligned
from .places import num_cpus as num_cpus
from .waiting import spins_in

SPIN_SECONDS = 50e-6            # of a waiting thread before it sleeps: about what it costs to fall asleep and be woken
PANEL = 32                      # rows of a product that are one task
_HUGE = 1 << 30


@dataclass(frozen=True)
class NumaHint:
    """Where memory that threads read is to lie: ``local`` (touched first by the thread that will read it) or ``interleaved``."""

    policy: str

    def __post_init__(self):
        if self.policy not in ("local", "interleaved"):
            raise ValueError(f"a NumaHint is local or interleaved, not {self.policy!r}")

    @classmethod
    def local(cls) -> "NumaHint":
        return cls("local")

    @classmethod
    def interleaved(cls) -> "NumaHint":
        return cls("interleaved")


@dataclass(frozen=True)
class WorkDistribution:
    """How the threads of a pool share a loop.

    ``schedule``: ``static`` (one range each), ``dynamic`` (chunks from a shared counter), ``guided`` (shares of what is left),
    ``nested`` (groups of threads with a range each, dealt out inside the group), ``tiled`` (blocks of rows x tokens from a shared
    counter; inside a block the caches' own), ``steal`` (own ranges; who has none left takes half of another's).
    ``min_chunk`` and ``max_chunk`` bound the chunks of all but ``static`` and ``tiled``, in rows of a product or in tasks of
    another loop; between them a thread gets ``tasks_per_thread`` chunks. Where there is not a ``min_chunk`` for each thread, they
    get equal ones. ``groups``: of ``nested``, by default the root of the number of threads. ``tile_rows`` and ``tile_tokens``: a
    block of ``tiled``, by default what the second-level cache holds. ``numa``: where memory that the loop reads is to lie.
    """

    schedule: str = "static"
    min_chunk: int = 64
    max_chunk: int = 4096
    tasks_per_thread: int = 4
    numa: NumaHint = NumaHint("local")
    groups: int = 0
    tile_rows: int = 0
    tile_tokens: int = 0

    def __post_init__(self):
        if self.schedule not in team.SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(team.SCHEDULES)}, not {self.schedule!r}")
        if not 1 <= self.min_chunk <= self.max_chunk:
            raise ValueError(f"1 <= min_chunk <= max_chunk is needed, not {self.min_chunk} and {self.max_chunk}")
        if self.tasks_per_thread < 1:
            raise ValueError(f"tasks_per_thread must be at least 1, not {self.tasks_per_thread}")
        for name in ("groups", "tile_rows", "tile_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 1, or 0 for the default, not {getattr(self, name)}")
        if not isinstance(self.numa, NumaHint):
            raise ValueError(f"numa must be NumaHint.local() or NumaHint.interleaved(), not {self.numa!r}")

    @classmethod
    def for_matmul(cls, rows: int, cols: int, schedule: str = "steal") -> "WorkDistribution":
        """For a product of [rows, cols] weights: chunks that take about as long as waking a thread, or longer."""
        smallest = max(PANEL, min(rows, (1 << 18) // max(1, cols) // PANEL * PANEL))
        return cls(schedule, smallest, max(smallest, 4096))

    @classmethod
    def for_attention(cls, heads: int, length: int, schedule: str = "dynamic") -> "WorkDistribution":
        """For attention over ``length`` positions: one head at a time, or several where they are short."""
        smallest = max(1, min(heads, 256 // max(1, length)))
        return cls(schedule, smallest, max(smallest, heads, 1))

    def record(self, threads: int, unit: int = 1) -> np.ndarray:
        """What compiled code reads, for a pool of ``threads``; a task is ``unit`` of what min_chunk and max_chunk count."""
        caches = places.cache_sizes()
        rows = self.tile_rows or max(PANEL, min(512, caches.l2 // 8192 // PANEL * PANEL))
        tokens = self.tile_tokens or max(48, caches.l2 // 16384)
        return np.array([(team.SCHEDULES.index(self.schedule), max(1, self.min_chunk // unit), max(1, self.max_chunk // unit),
                          self.tasks_per_thread, self.groups or isqrt(threads), rows, tokens)], team.WORK)


ONE_TASK = WorkDistribution("dynamic", 1, _HUGE)


@dataclass(frozen=True)
class WorkStealingStats:
    """What the members of a pool did since the last reset: chunks handed out, and how many of them had to be stolen."""

    tasks_created: int
    tasks_stolen: int
    tasks_of_member: tuple[int, ...]
    waits: int                  # for other members, asleep

    def steal_ratio(self) -> float:
        """Share of the chunks that were stolen."""
        return self.tasks_stolen / self.tasks_created if self.tasks_created else 0.0


class _Worker(threading.Thread):
    """A member of a team other than the first. It keeps the team's words, never the pool: an unused pool can be collected."""

    def __init__(self, words: np.ndarray, member: int):
        super().__init__(name=f"member-{member}", daemon=True)
        self.words, self.member = words, member

    def run(self):
        team.serve(address(self.words), self.member)


class Pool:
    """``threads`` members, the calling thread included, each with ``scratch_bytes`` of scratch.

    ``bind``: a set of cpus for each member (see ``places``), or None for no binding; the calling thread is the first, and gets
    its affinity back by ``close``. Programs may be run from any thread, one at a time. Workers end with ``close``, when the pool
    is collected, or at the end of the process. Raises ValueError, or OSError for cpus that this process may not use.
    """

    def __init__(self, threads: int, scratch_bytes: int = 1 << 20, bind: list[set[int]] | None = None):
        if threads < 1:
            raise ValueError(f"a pool has at least 1 thread, not {threads}")
        self.threads = threads
        self.words = aligned(team.words(threads), np.int64, 0)
        self.words[team.THREADS], self.words[team.SPINS] = threads, spins_in(SPIN_SECONDS)
        self.address = address(self.words)
        self._scratch: list[np.ndarray] = []
        self._lock, self._closed, self._process = threading.Lock(), False, os.getpid()
        self._creator, self._affinity = threading.current_thread(), os.sched_getaffinity(0)
        self.need_scratch(scratch_bytes)
        self._bound, self._workers = False, [_Worker(self.words, member) for member in range(1, threads)]
        if self._workers:
            # Compile before a thread needs it: workers must not meet in the compiler, nor a collection start it.
            team.serve.compile("void(int64, int64)")
            team.stop.compile("void(int64)")
            self._end = weakref.finalize(self, _stop, self.words)
        try:
            for worker in self._workers:
                worker.start()
            if bind is not None:
                self.bind(bind)
        except BaseException:
            self.close()
            raise

    def bind(self, places: list[set[int]] | None) -> None:
        """Binds every member to a set of cpus, the calling thread as the first; None changes nothing."""
        if places is None:
            return
        if len(places) != self.threads:
            raise ValueError(f"a pool of {self.threads} threads must be bound to as many sets of cpus, not {len(places)}")
        self._bound = True
        for thread, cpus in zip((self._creator, *self._workers), places, strict=True):
            os.sched_setaffinity(thread.native_id, cpus)

    def _own(self, member: int) -> np.ndarray:
        start = team.GROUPS + 8 * self.threads + team.MEMBER_WORDS * member
        return self.words[start : start + team.MEMBER_WORDS]

    def need_scratch(self, size: int) -> None:
        """Sees to it that every member has so much scratch; not while a program runs."""
        if not self._scratch or len(self._scratch[0]) < size:
            # Untouched pages: the member that first writes them gets them on its own NUMA node.
            self._scratch = [aligned(size, np.uint8) for _ in range(self.threads)]
            for member, scratch in enumerate(self._scratch):
                self._own(member)[team.SCRATCH] = address(scratch)

    def execute(self, operations: int, count: int, status: int) -> int:
        """Runs a program that lies at these addresses; see ``team.run``. Raises RuntimeError where the workers are gone."""
        if self._process != os.getpid():
            raise RuntimeError(f"this pool's threads belong to process {self._process}: make a pool in each process")
        with self._lock:
            if self._closed:
                raise RuntimeError("this pool is closed")
            return team.run(self.address, operations, count, status)

    def reached(self) -> list[int]:
        """Where each member's last operation stands (see ``Program.find``); may be asked from any thread, at any time."""
        return [int(self._own(member)[team.REACHED]) for member in range(self.threads)]

    def stats(self) -> WorkStealingStats:
        """The counters since ``reset``."""
        own = [self._own(member) for member in range(self.threads)]
        tasks = tuple(int(words[team.TASKS]) for words in own)
        return WorkStealingStats(sum(tasks), sum(int(w[team.STEALS]) for w in own), tasks, sum(int(w[team.WAITS]) for w in own))

    def reset(self) -> None:
        """Sets the counters to zero."""
        for member in range(self.threads):
            self._own(member)[[team.TASKS, team.STEALS, team.WAITS]] = 0

    def close(self) -> None:
        """Ends the workers, a running program first; the pool cannot be used afterwards. May be called again."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._workers:
                self._end()
            for worker in self._workers:
                if worker.ident is not None:
                    worker.join()
            if self._bound and self._creator.is_alive():
                os.sched_setaffinity(self._creator.native_id, self._affinity)


def _stop(words: np.ndarray) -> None:
    team.stop(address(words))


@atexit.register
def _end_workers() -> None:
    """No thread may come back from compiled code into an interpreter that is being taken down."""
    workers = [thread for thread in threading.enumerate() if isinstance(thread, _Worker)]
    for worker in workers:
        _stop(worker.words)
    for worker in workers:
        worker.join()
