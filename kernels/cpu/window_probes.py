"""What processes of one node can do at best through memory that they share: hand over, and add up, by flags. For benchmarks.

Each rank has a part of the memory: two words on lines of their own, ``READY`` and ``DONE``, then ``words`` int64 that it gives to
the others, then as many for a result. The two words count repetitions. In each the rank writes its number into every ``FRESH``-th
int64 that it gives: no line of it is then in the others' caches, and what they read behind a flag must be new.
"""

from numba import njit

from .memory import LINE, atomic_load, atomic_store, int64_at
from .waiting import nap

READY, DONE, DATA = 0, LINE, 2 * LINE  # bytes from the start of a part
FRESH = LINE // 8               # words
_STEP = 1024                    # words that are added up at a time: they stay in the first-level cache
_NAP = 20                       # microseconds


def part_bytes(words: int) -> int:
    """Bytes of a rank's part: whole lines."""
    return DATA + -(-16 * words // LINE) * LINE


@njit(cache=True)
def _wait_for(where, repetition, looks):
    """Waits until a word has reached ``repetition``; after so many looks it sleeps between them, as ranks may share a core."""
    looked = 0
    while atomic_load(where) < repetition:
        looked += 1
        if looked > looks:
            nap(_NAP)


@njit(cache=True)
def _give(part, words, repetition):
    data = int64_at(part + DATA)
    for i in range(0, words, FRESH):
        data[i] = repetition
    atomic_store(part + READY, repetition)


@njit(cache=True)
def copy_from_next(parts, rank, words, out, first, times, looks):
    """Repetitions first … first + times - 1: out[:words] = what the next rank gives. ``parts``: int64 addresses, one a rank."""
    own, source, reader = parts[rank], parts[(rank + 1) % len(parts)], parts[(rank - 1) % len(parts)]
    data = int64_at(source + DATA)
    for repetition in range(first, first + times):
        _give(own, words, repetition)
        _wait_for(source + READY, repetition, looks)
        for i in range(words):
            out[i] = data[i]
        atomic_store(own + DONE, repetition)
        _wait_for(reader + DONE, repetition, looks)


@njit(cache=True)
def sum_of_all(parts, rank, words, out, first, times, looks):
    """The same with out[:words] = the sum of what all ranks give: each adds up a slice, then reads those of the others."""
    ranks, own = len(parts), parts[rank]
    result = int64_at(own + DATA + 8 * words)
    for repetition in range(first, first + times):
        _give(own, words, repetition)
        for other in range(ranks):
            _wait_for(parts[other] + READY, repetition, looks)
        for start in range(words * rank // ranks, words * (rank + 1) // ranks, _STEP):
            stop = min(start + _STEP, words * (rank + 1) // ranks)
            data = int64_at(parts[0] + DATA)
            for i in range(start, stop):
                result[i] = data[i]
            for other in range(1, ranks):
                data = int64_at(parts[other] + DATA)
                for i in range(start, stop):
                    result[i] += data[i]
        atomic_store(own + DONE, repetition)
        for other in range(ranks):
            _wait_for(parts[other] + DONE, repetition, looks)
            data = int64_at(parts[other] + DATA + 8 * words)
            for i in range(words * other // ranks, words * (other + 1) // ranks):
                out[i] = data[i]
