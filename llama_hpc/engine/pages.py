"""Pages of the KV cache: who holds them, and which beginnings of texts they store.

Equal beginnings are stored once. What a page stores is named by its 16 tokens and the name of the page before it, compared in
full: no hash decides what is equal. As keys and values have the same bits however they were computed, a page that is found
is as good as one computed again. A page that nobody holds keeps its content until the room is needed, the oldest first
(vLLM's prefix caching; Kwon et al. 2023).
"""

from collections import OrderedDict

import numpy as np

from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import BLOCK_PAGES

ROOT = 0                        # the name of what lies before the first page


class PagePool:
    """``count`` pages. ``sharing`` False: every sequence computes its own.

    ``parts``: of the cache, see ``kv_cache``; ``count`` is a multiple of it. In which one a sequence's pages lie follows from the
    part of its first block.
    """

    def __init__(self, count: int, sharing: bool = True, parts: int = 1):
        self.count, self.sharing, self.parts = count, sharing, parts
        self.shared_tokens = 0          # tokens that were found and not computed
        self.most_used = 0
        self._free = [list(range(count - parts + part, -1, -parts)) for part in range(parts)]
        self._withheld = 0              # pages of each part that stay free
        self._least_free = [count // parts] * parts
        # Held by nobody, but with known content; oldest first.
        self._kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(parts)]
        self._holders = [0] * count
        self._key: list[tuple[int, bytes] | None] = [None] * count
        self._stored: dict[tuple[int, bytes], tuple[int, int]] = {}     # (name before it, tokens): (page, its name)
        self._names = ROOT

    @property
    def available(self) -> int:
        """Pages that no sequence holds."""
        return sum(map(len, self._free)) + sum(map(len, self._kept))

    def room(self) -> list[int]:
        """Pages that ``take`` can still give of each part."""
        return [len(free) - self._withheld + len(kept) for free, kept in zip(self._free, self._kept, strict=True)]

    @property
    def touched(self) -> int:
        """Pages with memory behind them: those that have had a content since the last ``forget``."""
        return self.count - sum(self._least_free)

    def withhold(self, pages: int) -> bool:
        """From now on no more than ``pages``, a multiple of the parts, hold or keep anything. False while sequences hold more:
        call it again when one has let go of its own."""
        self._withheld = (self.count - pages) // self.parts
        for free, kept in zip(self._free, self._kept, strict=True):
            while len(free) < self._withheld and kept:
                free.append(self._oldest_of(kept))
        return all(len(free) >= self._withheld for free in self._free)

    def forget(self, part: int) -> list[int]:
        """Pages of a part without any content, the memory of which can be given back; forgets that they had one."""
        self._least_free = list(map(len, self._free))
        return [page // self.parts for page in self._free[part]]

    def first_part(self, tokens: np.ndarray) -> int:
        """The part for the first block of a sequence of these tokens: where its beginning is stored, else that of most room."""
        stored = self._stored.get((ROOT, tokens[:PAGE].tobytes())) if len(tokens) > PAGE else None
        if stored is not None:
            return stored[0] % self.parts
        room = self.room()
        return room.index(max(room))

    def part_of(self, first_part: int, number: int) -> int:
        """The part for a sequence's page of this number, if its first block lies in ``first_part``."""
        return (first_part + number // BLOCK_PAGES) % self.parts

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.count - self.available

    def find(self, tokens: np.ndarray) -> tuple[list[int], int]:
        """Pages that store the beginning of ``tokens`` int32, now held once more, and the name of the last one.

        At least one token is left over, whose logits have to be computed.
        """
        pages, name = [], ROOT
        if self.sharing:
            for first in range(0, len(tokens) - PAGE, PAGE):
                found = self._stored.get((name, tokens[first : first + PAGE].tobytes()))
                # Two sequences that computed the same at the same time may have begun in different parts.
                if found is None or (pages and found[0] % self.parts != self.part_of(pages[0] % self.parts, len(pages))):
                    break
                page, name = found
                self._hold(page)
                pages.append(page)
            self.shared_tokens += len(pages) * PAGE
        return pages, name

    def take(self, part: int = 0) -> int | None:
        """A page of a part to write to, or None."""
        free = self._free[part]
        if len(free) > self._withheld:
            page = free.pop()
            self._least_free[part] = min(self._least_free[part], len(free))
        elif self._kept[part]:
            page = self._oldest_of(self._kept[part])
        else:
            return None
        self._holders[page] = 1
        self.most_used = max(self.most_used, self.used)
        return page

    def _oldest_of(self, kept: OrderedDict[int, None]) -> int:
        """The page whose content has not been of use for longest, now without it."""
        page = kept.popitem(last=False)[0]
        del self._stored[self._key[page]]
        self._key[page] = None
        return page

    def store(self, page: int, before: int, tokens: np.ndarray) -> int:
        """Notes that a page is about to store these 16 tokens behind the page named ``before``; returns its name."""
        if not self.sharing:
            return ROOT
        key = before, tokens.tobytes()
        if key not in self._stored:
            self._names += 1
            self._stored[key], self._key[page] = (page, self._names), key
        return self._stored[key][1]

    def release(self, pages: list[int]) -> None:
        """Lets go of a sequence's pages, in its order. Later ones, of use to fewer texts, are given away first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._key[page] is None:
                    self._free[page % self.parts].append(page)
                else:
                    self._kept[page % self.parts][page] = None

    def _hold(self, page: int) -> None:
        self._kept[page % self.parts].pop(page, None)
        self._holders[page] += 1
        self.most_used = max(self.most_used, self.used)
