"""Which tokens of which windows run in the next step of scoring, derived alike by all ranks of a replica."""

from collections import deque

import numpy as np

from llama_hpc.engine.documents import ReadyDocument, Window
from llama_hpc.engine.pages import PagePool
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import pages_in_a_part, pages_of
from llama_hpc.model.transformer import Batch

MOST_WINDOWS = 256              # in a step


def pages_needed(budget: int, longest: int, parts: int = 1) -> int:
    """Pages of a cache of ``parts`` parts for steps of ``budget`` rows, of windows of up to ``longest`` rows: one may have begun
    before the step, and of each of the others a page is not full; these may all lie in one part."""
    return parts * (pages_in_a_part(longest, parts) + pages_of(budget) + MOST_WINDOWS)


class Packer:
    """Fills steps of up to ``budget`` rows with admitted windows, one after the other; a long one goes on in the next step.

    ``table`` int32 [MOST_WINDOWS, pages of a window] is the cache's page table: a window's place in it is its place in the step.
    ``first_parts`` int32 [MOST_WINDOWS]: see ``KVCache``.
    """

    def __init__(self, documents: list[ReadyDocument], windows: list[Window], budget: int, pool: PagePool, table: np.ndarray,
                 first_parts: np.ndarray | None = None):
        self.documents, self.windows, self.budget, self.pool, self.table = documents, windows, budget, pool, table
        self._first_parts = np.zeros(MOST_WINDOWS, np.int32) if first_parts is None else first_parts
        self._waiting: deque[int] = deque()
        self._done = 0                      # rows of the first one that have run
        self._pages: list[int] = []         # which it has
        self._tokens, self._place, self._positions = (np.zeros(budget, np.int32) for _ in range(3))
        self._outputs, self._targets = np.zeros(budget, np.int64), np.zeros(budget, np.int64)

    @property
    def waiting(self) -> int:
        """Windows that have not run to their end."""
        return len(self._waiting)

    def admit(self, number: int) -> None:
        """A window, by its number, takes its turn behind the others."""
        self._waiting.append(number)

    def plan(self) -> tuple[Batch, np.ndarray, list[tuple[int, slice]]]:
        """The next step, perhaps an empty one; int64 tokens, for each of its outputs the one whose log-probability is wanted; and
        what these are, in this order: numbers of windows, and which of the tokens that they score."""
        row = place = outputs = 0
        parts, finished = [], []
        while self._waiting and row < self.budget and place < MOST_WINDOWS:
            number = self._waiting[0]
            window = self.windows[number]
            tokens = self.documents[window.document].tokens[window.start : window.stop]
            start = self._done
            stop = min(window.rows, start + self.budget - row)
            rows = slice(row, row + stop - start)
            self._tokens[rows], self._place[rows], self._positions[rows] = tokens[start:stop], place, np.arange(start, stop)
            # The row of a token tells about the next one.
            scored = window.first - window.start - 1
            first = max(start, scored)
            if first < stop:
                wanted = slice(outputs, outputs + stop - first)
                self._outputs[wanted] = np.arange(row + first - start, rows.stop)
                self._targets[wanted] = tokens[first + 1 : stop + 1]
                parts.append((number, slice(first - scored, stop - scored)))
                outputs = wanted.stop
            self._hold(place, stop)
            row, place = rows.stop, place + 1
            self._done = stop
            if stop == window.rows:
                finished += self._pages
                self._waiting.popleft()
                self._done, self._pages = 0, []
        # Only now: windows of one step must not share a page.
        self.pool.release(finished)
        return Batch(row, self._tokens, self._place, self._positions, self._outputs[:outputs]), self._targets[:outputs], parts

    def _hold(self, place: int, rows: int) -> None:
        """Pages for the first ``rows`` rows of a window."""
        pool = self.pool
        first_part = self._pages[0] % pool.parts if self._pages else pool.first_part(self._tokens[:0])
        while len(self._pages) * PAGE < rows:
            self._pages.append(pool.take(pool.part_of(first_part, len(self._pages))))
        self._first_parts[place] = first_part
        self.table[place, : len(self._pages)] = [page // pool.parts for page in self._pages]
