"""Worker pools: threads that run the same program, share its loops by a schedule, and wait without taking a core from others.

A pool has ``threads`` members; the caller of ``Program.run`` is the first. The others are Python threads that stay in compiled code
without the interpreter's lock. Names follow OpenMP's.
"""

import atexit
import os
import threading
from dataclasses import dataclass
from math import isqrt

import numpy as np

from . import places, team
from .memory import address, aligned

SPINS = 4000                    # looks at a word before a waiting thread gives way: some tens of microseconds
PANEL = 32                      # rows of a product that are one task
_HUGE = 1 << 30


@dataclass(frozen=True)
class NumaHint:
    """Where memory that threads read is to lie: ``local`` (touched first by the thread that will read it) or ``interleaved``."""

    policy: str

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
    ``min_chunk`` and ``max_chunk`` bound a chunk, in rows of a product, or in the tasks of another loop; without them a thread gets
    ``tasks_per_thread`` chunks. ``groups``: of ``nested``, by default the root of the number of threads. ``tile_rows`` and
    ``tile_tokens``: a block of ``tiled``, by default what the second-level cache holds.
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

    @classmethod
    def for_matmul(cls, rows: int, cols: int, schedule: str = "dynamic") -> "WorkDistribution":
        """For a product of [rows, cols] weights: chunks that take about as long as waking a thread, or longer."""
        smallest = max(PANEL, min(rows, (1 << 18) // max(1, cols) // PANEL * PANEL))
        return cls(schedule, smallest, max(smallest, 4096))

    @classmethod
    def for_attention(cls, heads: int, length: int, schedule: str = "dynamic") -> "WorkDistribution":
        """For attention over ``length`` positions: one head at a time, or several where they are short."""
        smallest = max(1, min(heads, 256 // max(1, length)))
        return cls(schedule, smallest, max(smallest, heads, 1), numa=NumaHint.local())

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
    waits: int

    def steal_ratio(self) -> float:
        """Share of the chunks that were stolen."""
        return self.tasks_stolen / self.tasks_created if self.tasks_created else 0.0


class Pool:
    """``threads`` members, the calling thread included, each with ``scratch_bytes`` of scratch.

    Members are bound as OMP_PROC_BIND and OMP_PLACES say, or ``bind`` (a list of sets of cpus, or None for no binding); see
    ``places``. Use ``close`` or leave it to the end of the process.
    """

    def __init__(self, threads: int, scratch_bytes: int = 1 << 20, bind: list[set[int]] | None = None, spins: int = SPINS):
        if threads < 1:
            raise ValueError(f"a pool has at least 1 thread, not {threads}")
        self.threads = threads
        self.words = aligned(team.words(threads), np.int64, 0)
        self.words[team.THREADS], self.words[team.SPINS] = threads, spins
        self.address = address(self.words)
        self._scratch: list[np.ndarray] = []
        self._bind, self._workers = bind, []
        self.need_scratch(scratch_bytes)
        if bind is not None:
            os.sched_setaffinity(0, bind[0])
        if threads > 1:
            # Compile before a thread needs it: workers must not meet in the compiler.
            team.serve.compile("void(int64, int64)")
            for member in range(1, threads):
                worker = threading.Thread(target=self._serve, args=(member,), name=f"member-{member}", daemon=True)
                self._workers.append(worker)
                worker.start()
            atexit.register(self.close)

    def _serve(self, member: int) -> None:
        if self._bind is not None:
            os.sched_setaffinity(0, self._bind[member])
        team.serve(self.address, member)

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
        """Ends the workers; the pool cannot be used afterwards."""
        if self._workers:
            self.words[team.STOP] = 1
            for worker in self._workers:
                worker.join()
            self._workers = []
            atexit.unregister(self.close)


