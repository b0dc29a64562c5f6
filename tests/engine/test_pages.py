"""Pages of the KV cache: equal beginnings are found, nobody loses a page that he holds, and nothing is forgotten too early."""

import random

import numpy as np
import pytest

from llama_hpc.engine.pages import ROOT, PagePool
from llama_hpc.kernels.numerics import PAGE


def text(*pages, rest=0):
    """Tokens: for each number a page full of it, and some more."""
    return np.array([n for n in pages for _ in range(PAGE)] + [99] * rest, np.int32)


def fill(pool, tokens):
    """What a sequence does: finds, takes and stores; returns its pages."""
    pages, name = pool.find(tokens)
    for first in range(len(pages) * PAGE, len(tokens), PAGE):
        pages.append(pool.take())
        if first + PAGE <= len(tokens):
            name = pool.store(pages[-1], name, tokens[first : first + PAGE])
    return pages


def test_equal_beginnings_share_their_pages():
    pool = PagePool(20)
    first, second = fill(pool, text(1, 2, 3, rest=5)), fill(pool, text(1, 2, 4, rest=5))
    assert first[:2] == second[:2] and not set(first[2:]) & set(second[2:])
    assert pool.shared_tokens == 2 * PAGE and pool.used == pool.most_used == 6
    # A page says nothing without those before it.
    assert not set(fill(pool, text(2, 3, rest=1))) & set(first)


def test_the_last_token_is_left_to_compute():
    pool = PagePool(20)
    fill(pool, text(1, 2, rest=1))
    assert len(pool.find(text(1, 2))[0]) == 1
    assert len(pool.find(text(1, 2, rest=1))[0]) == 2
    assert pool.find(text(rest=1)) == ([], ROOT)


def test_released_pages_are_found_until_their_room_is_needed():
    pool = PagePool(4)
    pages = fill(pool, text(1, 2, 3))
    pool.release(pages)
    assert pool.used == 0 and pool.available == 4
    # Unwritten pages go first, then the end of the oldest text.
    assert pool.take() not in pages and pool.take() == pages[2]
    assert pool.find(text(1, 2, 3, rest=1))[0] == pages[:2]
    assert pool.take() is None and pool.available == 0


def test_what_was_used_last_is_kept_longest():
    pool = PagePool(2)
    one = fill(pool, text(1, rest=0))
    two = fill(pool, text(2, rest=0))
    pool.release(one)
    pool.release(two)
    found, _ = pool.find(text(1, rest=1))
    pool.release(found)
    assert pool.take() == two[0]


def test_without_sharing_everything_is_computed():
    pool = PagePool(8, sharing=False)
    first, second = fill(pool, text(1, 2)), fill(pool, text(1, 2))
    assert not set(first) & set(second) and pool.shared_tokens == 0
    pool.release(first)
    assert pool.available == 6


@pytest.mark.parametrize("seed", range(30))
def test_pages_hold_what_they_are_found_for(seed):
    """Random texts with common beginnings come and go; the content of every page is written down beside the pool."""
    draw, pool = random.Random(seed), PagePool(24)
    content, live = {}, []
    for _ in range(300):
        if live and (draw.random() < 0.5 or pool.available < 5):
            pool.release(live.pop(draw.randrange(len(live)))[0])
            continue
        tokens = text(*(draw.randint(1, 2) for _ in range(draw.randint(0, 4))), rest=draw.randint(1, PAGE - 1))
        pages, name = pool.find(tokens)
        for i, page in enumerate(pages):
            assert content[page] == tokens[: (i + 1) * PAGE].tolist()
        while len(pages) * PAGE < len(tokens):
            page = pool.take()
            assert all(page not in held for held, _ in live) and page not in pages
            pages.append(page)
            end = len(pages) * PAGE
            content[page] = tokens[:end].tolist() if end <= len(tokens) else None
            if end <= len(tokens):
                name = pool.store(page, name, tokens[end - PAGE : end])
        live.append((pages, tokens))
        for held, owned in live:
            assert all(content[page] in (None, owned[: (i + 1) * PAGE].tolist()) for i, page in enumerate(held))
        assert pool.used == len({page for held, _ in live for page in held})
    for pages, _ in live:
        pool.release(pages)
    assert pool.available == 24 and pool.used == 0


def test_parts_give_their_own_pages():
    pool = PagePool(6, parts=3)
    assert [pool.take(part) for part in (1, 1, 1, 0)] == [1, 4, None, 0] and pool.room() == [1, 0, 2]
    assert pool.first_part(text()) == 2 and pool.available == 3
    pool.release([4, 1])
    assert pool.room() == [1, 2, 2] and pool.first_part(text()) == 1 and {pool.take(1), pool.take(1)} == {1, 4}
    # Blocks of 16 pages take turns.
    assert [pool.part_of(2, number) for number in (0, 15, 16, 47, 48)] == [2, 2, 0, 1, 2]


def test_kept_pages_of_another_part_make_no_room():
    pool = PagePool(4, parts=2)
    first = pool.take(0)
    pool.store(first, ROOT, text(1))
    pool.release([first])
    assert [pool.take(1), pool.take(1), pool.take(1)] == [1, 3, None]
    # Where a sequence begins follows from what it shares, before the room.
    assert [pool.first_part(tokens) for tokens in (text(1, rest=1), text(2, rest=1))] == [0, 0]
    assert pool.find(text(1, rest=1))[0] == [first]
    pool.release([first])
    assert {pool.take(0), pool.take(0)} == {0, 2} and pool.find(text(1, rest=1))[0] == []


def test_a_page_that_lies_in_the_wrong_part_is_not_found():
    """Two sequences compute the same at the same time, one from each part on; the second one gets further."""
    pool = PagePool(80, parts=2)
    numbers = range(17)
    tokens = text(*numbers)
    def run(first_part, count, name):
        pages = [pool.take(pool.part_of(first_part, number)) for number in range(count)]
        for number, page in enumerate(pages):
            name = pool.store(page, name, tokens[number * PAGE : (number + 1) * PAGE])
        return pages
    first, second = run(0, 16, ROOT), run(1, 17, ROOT)
    assert first[0] % 2 == 0 and second[16] % 2 == 0
    found = pool.find(text(*numbers, rest=1))[0]
    assert found == first[:16]
