"""Steps of scoring: every token of every window runs once, behind those before it, on pages that no other window uses."""

import numpy as np
import pytest

from llama_hpc.engine.documents import ReadyDocument, windows_of
from llama_hpc.engine.packing import MOST_WINDOWS, Packer, pages_needed
from llama_hpc.engine.pages import PagePool
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, PAGE
from llama_hpc.model.kv_cache import pages_of


@pytest.mark.parametrize("cache_parts", [1, 3])
@pytest.mark.parametrize(("budget", "window", "stride"), [(1, 20, 7), (7, 20, 20), (64, 20, 1), (500, 70, 35), (2000, 3, 1),
                                                          (200, 700, 300)])
def test_steps(budget, window, stride, cache_parts):
    rng = np.random.default_rng(budget)
    lengths = (2, 3, 150, 40, 41, *([2] * 300), *([900] * (window > 100)))
    documents = [ReadyDocument(str(i), rng.integers(0, 1000, n, dtype=np.int32)) for i, n in enumerate(lengths)]
    windows = windows_of(documents, window, stride)
    longest = max(w.rows for w in windows)
    pool, first_parts = PagePool(pages_needed(budget, longest, cache_parts), False, cache_parts), np.zeros(MOST_WINDOWS, np.int32)
    packer = Packer(documents, windows, budget, pool, np.zeros((MOST_WINDOWS, pages_of(longest)), np.int32), first_parts)
    def page_of(place, position):
        """The part and its page."""
        return (first_parts[place] + position // ATTENTION_BLOCK) % cache_parts, packer.table[place][position // PAGE]
    for number in range(len(windows)):
        packer.admit(number)
    cache, scored = {}, []          # what lies where, as (window's beginning, tokens so far)
    while (step := packer.plan())[0].rows:
        batch, targets, parts = step
        assert batch.rows <= budget and batch.sequences[: batch.rows].max() < MOST_WINDOWS
        seen, owner = [], {}
        for token, place, position in zip(*(a[: batch.rows].tolist() for a in (batch.tokens, batch.sequences, batch.positions)),
                                          strict=True):
            assert owner.setdefault(page_of(place, position), place) == place
            cache[page_of(place, position), position % PAGE] = token
            seen.append([cache[page_of(place, p), p % PAGE] for p in range(position + 1)])
        assert len(targets) == len(batch.outputs) == sum(part.stop - part.start for _, part in parts)
        numbers = [(number, place) for number, part in parts for place in range(part.start, part.stop)]
        scored += zip(numbers, targets.tolist(), (seen[row] for row in batch.outputs), strict=True)
    assert pool.used == 0
    expected = [((number, token - w.first), int(tokens[token]), tokens[w.start : token].tolist())
                for number, w in enumerate(windows)
                for tokens in [documents[w.document].tokens] for token in range(w.first, w.stop)]
    assert scored == expected
