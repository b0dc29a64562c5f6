"""A replica whose memory runs short on some node: its cache shrinks before the system kills a rank, and grows again later.

Each rank looks now and then at what its node and its cgroups have left, and raises a shared counter when that is little. The
leader reads it, and tells all ranks with its next outcome how many pages may be in use: they set back the same sequences, and
give the memory of pages without content back. No answer changes.
"""

import logging
import time

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.queue import COUNTERS, PRESSURE
from llama_hpc.model.kv_cache import pages_in_a_part
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.runtime.tables import size
from llama_hpc.runtime.topology import hostname, memory_limits

MARGIN, MOST_MARGIN = 0.05, 4 << 30     # of a limit, and bytes: with less left, memory is short, with half of it, very short
_VERY = 1 << 32                 # what a rank that is very short adds to the counter
_SETTLE = 2.0                   # seconds in which what was given back shows
_CALM = 30.0                    # seconds without want, behind which the cache grows
_SHRINK, _GROW = 7 / 8, 5 / 4


class Pressure:
    """One rank's part for replica number ``replica``, whose pages are in ``pool`` and in the cache of ``stage``. The leader tells
    ``pages``: so many may be in use, always as many as a sequence of ``longest`` positions needs. Where memory is short these are
    no more than have memory behind them, where it is very short fewer and fewer. ``events`` counts how often the cache shrank."""

    def __init__(self, counters: SharedCounters, replica: int, pool: PagePool, stage: TransformerStage, longest: int):
        self.counters, self.pool, self.stage, self.pages, self.events = counters, pool, stage, pool.count, 0
        self._least = pool.parts * pages_in_a_part(longest, pool.parts)
        self._own = COUNTERS + replica
        # A job that outlives ranks counts in a file, which an earlier run may have left.
        self._seen, self._changed, self._short = counters.read(self._own), float("-inf"), float("-inf")
        self._followed = pool.count

    def look(self) -> None:
        """Any rank: says so where memory is short; the first one to see it in the whole job logs it."""
        left, limit = min(memory_limits(), key=lambda each: each[0] - _margin(each[1]))
        if left >= _margin(limit):
            return
        self.counters.add(self._own, 1 if left >= _margin(limit) / 2 else _VERY)
        if self.counters.add(PRESSURE, 1) == 0:
            logging.getLogger(__name__).warning("memory is short on %s, %s of %s left: batches shrink", hostname(), size(left),
                                                size(limit))

    def decide(self) -> None:
        """The leader, behind ``look``: sets ``pages`` for the next steps."""
        seen, now = self.counters.read(self._own), time.monotonic()
        new, self._seen = seen - self._seen, seen
        if new:
            self._short = now
            if now - self._changed > _SETTLE:
                self._set(min(self.pages, self.pool.touched) * (_SHRINK if new >= _VERY else 1), now)
        elif self.pages < self.pool.count and now - max(self._changed, self._short) > _CALM:
            self._set(self.pages * _GROW + self.pool.parts, now)

    def follow(self, pages: int) -> None:
        """Any rank, behind an outcome that its scheduler has applied: so many pages may be in use."""
        if pages < self._followed:
            self.events += 1
            # This rank has computed every step that was planned: nothing reads any more what lies there.
            self.stage.cache.give_back(self.pool.forget(self.stage.share.context_index))
        self._followed = pages

    def _set(self, pages: float, now: float) -> None:
        whole = min(max(int(pages) // self.pool.parts * self.pool.parts, self._least), self.pool.count)
        if whole != self.pages:
            self.pages, self._changed = whole, now


def _margin(limit: int) -> float:
    return min(limit * MARGIN, MOST_MARGIN)
