"""The compiled part of a worker pool: barriers, shares of a loop, and running programs.

A team is an array of int64 words in lines of 64 bytes, of which any thread knows the address. Its threads run the same program:
operations, one after the other, with a barrier behind each. Inside an operation they share a loop over ``total`` tasks by one of
six schedules; ``begin`` and ``chunk`` deal it out and count what they hand to whom.
"""

import numpy as np
from numba import njit
from numba.extending import intrinsic

from .memory import atomic_add, atomic_load, atomic_replace, atomic_store, call, int64_at, record, record_pointer
from .waiting import advance, wait

STATIC, DYNAMIC, GUIDED, NESTED, TILED, STEAL = range(6)
SCHEDULES = ("static", "dynamic", "guided", "nested", "tiled", "steal")

# Words of a team; those that several threads write lie on lines of their own.
THREADS, SPINS, OPERATIONS, COUNT = 0, 1, 2, 3
GENERATION, ARRIVED, PHASE, STOP, NEXT = 8, 16, 24, 32, 40          # behind GENERATION and PHASE: their sleepers
GROUPS = 48                     # a line for each group of nested loops: its counter
MEMBER_WORDS = 32
# Words of a member, behind a line for every group: what is left of a range that others steal from; how often they did; its own,
# of which the last one tells the operation that it came to last, by where that stands in its program.
RANGE, LOST, OWN_RANGE, PIECES, LOOPS, STRIKES, TASKS, STEALS, WAITS, SCRATCH, REACHED = 0, 8, *range(16, 25)

WORK = record("schedule", "min_chunk", "max_chunk", "tasks_per_thread", "groups", "tile_rows", "tile_tokens")


@intrinsic
def work_at(typing_context, where):
    """A pointer to WORK records."""
    return record_pointer(WORK)


_STRIKES = 2                    # waits in vain, one after the other, before a barrier's waits are no longer spun out
_LOOKS, _PROBES = 16, 32        # how often it looks at a word then, and every how many waits it tries to spin again
_FEWEST, _MOST = 2, 64          # chunks into which ``steal`` divides a member's range


def words(threads: int) -> int:
    """Words of a team."""
    return GROUPS + 8 * threads + MEMBER_WORDS * threads


@njit(cache=True)
def member_words(team, member):
    """Address of a member's words."""
    return team + 8 * (GROUPS + 8 * int64_at(team)[THREADS] + MEMBER_WORDS * member)


@njit(cache=True)
def barrier(team, member):
    """Waits for all threads of the team; the last one readies the shared counters for the next loop. Returns whether it slept.

    Where spinning was in vain twice in a row, a thread of the team probably needs this very core: from then on the others get it
    almost at once, but for a try to spin now and then.
    """
    shared = int64_at(team)
    threads, phase = shared[THREADS], atomic_load(team + 8 * PHASE)
    if threads == 1 or atomic_add(team + 8 * ARRIVED, 1) + 1 == threads:
        shared[NEXT] = 0
        for group in range(threads):
            if shared[GROUPS + 8 * group] != 0:
                shared[GROUPS + 8 * group] = 0
        atomic_store(team + 8 * ARRIVED, 0)
        advance(team + 8 * PHASE)
        return 0
    own = int64_at(member_words(team, member))
    patient = own[STRIKES] < _STRIKES or own[STRIKES] % _PROBES == 0
    late = wait(team + 8 * PHASE, phase, shared[SPINS] if patient else _LOOKS)
    own[STRIKES] = own[STRIKES] + 1 if late else 0
    return late


@njit(cache=True)
def _execute(team, member, operations, count, late):
    """Runs a program; ``late`` and the result: whether it slept at the last barrier before it, and at its own last one.

    A member's counters are not written behind a program's last barrier, where the caller may read and reset them.
    """
    table, own = int64_at(operations), int64_at(member_words(team, member))
    for i in range(count):
        own[REACHED] = operations + 16 * i
        call(table[2 * i], member, table[2 * i + 1])
        own[WAITS] += late
        late = barrier(team, member)
    return late


@njit(cache=True, nogil=True)
def run(team, operations, count, status):
    """Runs a program as member 0 of a team: ``count`` operations, pairs of (function, record). Returns the number of the first
    operation whose word of ``status`` is set afterwards, or -1."""
    shared, flags = int64_at(team), int64_at(status)
    if count == 0:
        # Nothing would hold the workers together: one that is late would miss a generation.
        return -1
    if shared[THREADS] > 1:
        shared[OPERATIONS], shared[COUNT] = operations, count
        advance(team + 8 * GENERATION)
    int64_at(member_words(team, 0))[WAITS] += _execute(team, 0, operations, count, 0)
    for i in range(count):
        if flags[i] != 0:
            return i
    return -1


@njit(cache=True, nogil=True)
def serve(team, member):
    """Runs what member 0 starts, until the team is stopped."""
    shared, seen, late = int64_at(team), np.int64(0), 0
    while True:
        wait(team + 8 * GENERATION, seen, shared[SPINS])
        if atomic_load(team + 8 * STOP) != 0:
            return
        seen += 1
        late = _execute(team, member, shared[OPERATIONS], shared[COUNT], late)


@njit(cache=True)
def stop(team):
    """Ends ``serve`` of all members, those in the middle of a program behind it."""
    atomic_store(team + 8 * STOP, 1)
    advance(team + 8 * GENERATION)


@njit(cache=True)
def _packed(first, last, loop):
    """A range of tasks, and the last byte of the number of its loop."""
    return np.int64(first) | (np.int64(last) << np.int64(28)) | (np.int64(loop) << np.int64(56))


@njit(cache=True)
def _first(packed):
    return packed & np.int64(0xFFFFFFF)


@njit(cache=True)
def _last(packed):
    return (packed >> np.int64(28)) & np.int64(0xFFFFFFF)


@njit(cache=True)
def _part(total, member, threads, loop):
    """A member's equal part of a loop."""
    return _packed(total * member // threads, total * (member + 1) // threads, loop)


@njit(cache=True)
def group_of(member, threads, groups):
    """The group of a member, and its first and last + 1 member."""
    group = member * groups // threads
    first = (group * threads + groups - 1) // groups
    last = ((group + 1) * threads + groups - 1) // groups
    return group, first, last


@njit(cache=True)
def begin(team, member, work, total):
    """Readies a member's share of a loop over ``total`` < 2**28 tasks. ``work``: the distribution, a record WORK.

    With ``steal``, the size of chunks follows what the last such loop saw: half of it after a theft, twice of it without.
    """
    where, threads = member_words(team, member), int64_at(team)[THREADS]
    own = int64_at(where)
    if work.schedule == STATIC:
        own[OWN_RANGE] = _part(total, member, threads, 0)
    elif work.schedule == NESTED:
        # The outer level: a group's range, dealt out inside it.
        _, first, last = group_of(member, threads, max(1, min(work.groups, threads)))
        own[OWN_RANGE] = _packed(total * first // threads, total * last // threads, 0)
    elif work.schedule == STEAL:
        own[LOOPS] += 1
        pieces = own[PIECES] if own[PIECES] > 0 else 2 * work.tasks_per_thread
        pieces = 2 * pieces if atomic_load(where + 8 * LOST) > 0 else pieces // 2
        own[PIECES] = min(max(pieces, _FEWEST), _MOST)
        atomic_store(where + 8 * LOST, 0)


@njit(cache=True)
def chunk(team, member, work, total):
    """The next tasks of a member, first and last + 1; (0, 0) when there are none left."""
    first, last = _chunk(team, member, work, total)
    int64_at(member_words(team, member))[TASKS] += last > first
    return first, last


@njit(cache=True)
def _bounded(size, work, total, threads):
    """A chunk's size between the bounds, of which the lower one gives way where a thread would be left without."""
    return min(max(size, min(work.min_chunk, (total + threads - 1) // threads), 1), work.max_chunk)


@njit(cache=True)
def _chunk(team, member, work, total):
    threads, own = int64_at(team)[THREADS], int64_at(member_words(team, member))
    if work.schedule == STATIC:
        whole = own[OWN_RANGE]
        own[OWN_RANGE] = 0
        return _first(whole), _last(whole)
    if work.schedule == GUIDED:
        return _guided(team, work, total, threads)
    if work.schedule == STEAL:
        size = _bounded(total // (threads * max(1, own[PIECES])), work, total, threads)
        return _own_or_stolen(team, member, threads, total, size)
    size = 1 if work.schedule == TILED else _bounded(total // (threads * work.tasks_per_thread), work, total, threads)
    counter, start, end = team + 8 * NEXT, np.int64(0), np.int64(total)
    if work.schedule == NESTED:
        group, _, _ = group_of(member, threads, max(1, min(work.groups, threads)))
        counter, start, end = team + 8 * (GROUPS + 8 * group), _first(own[OWN_RANGE]), _last(own[OWN_RANGE])
    first = start + atomic_add(counter, size)
    return (first, min(first + size, end)) if first < end else (0, 0)


@njit(cache=True)
def _guided(team, work, total, threads):
    """A share of what is left: large chunks first, small ones at the end."""
    while True:
        first = atomic_load(team + 8 * NEXT)
        if first >= total:
            return 0, 0
        size = min(_bounded((total - first) // (2 * threads), work, total, threads), total - first)
        if atomic_replace(team + 8 * NEXT, first, first + size):
            return first, first + size


@njit(cache=True)
def _own_or_stolen(team, member, threads, total, size):
    """A chunk from the front of the own range, or of half of what another member has left, from its end."""
    mine, loop = member_words(team, member), int64_at(member_words(team, member))[LOOPS] & 127
    while True:
        whole = _range(mine + 8 * RANGE, total, member, threads, loop)
        first, last = _first(whole), _last(whole)
        if first >= last:
            break
        middle = min(first + size, last)
        if atomic_replace(mine + 8 * RANGE, whole, _packed(middle, last, loop)):
            return first, middle
    for step in range(1, threads):
        other = (member + step) % threads
        victim = member_words(team, other)
        while True:
            whole = _range(victim + 8 * RANGE, total, other, threads, loop)
            first, last = _first(whole), _last(whole)
            if first >= last:
                break
            half = first + (last - first) // 2
            if atomic_replace(victim + 8 * RANGE, whole, _packed(first, half, loop)):
                int64_at(mine)[STEALS] += 1
                atomic_add(victim + 8 * LOST, 1)
                middle = min(half + size, last)
                atomic_store(mine + 8 * RANGE, _packed(middle, last, loop))
                return half, middle
    return 0, 0


@njit(cache=True)
def _range(where, total, member, threads, loop):
    """What is left of a member's range in this loop. Whoever looks at it first puts it there, so that the part of a member that
    has not even come to the loop can be stolen; every word was used up in the loop before, and bears its number."""
    whole = atomic_load(where)
    if whole >> np.int64(56) == loop:
        return whole
    atomic_replace(where, whole, _part(total, member, threads, loop))
    return atomic_load(where)
