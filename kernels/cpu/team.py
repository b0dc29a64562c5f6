"""The compiled part of a worker pool: barriers, shares of a loop, and running programs.

A team is an array of int64 words in lines of 64 bytes, of which any thread knows the address. Its threads run the same program:
operations, one after the other, with a barrier behind each. Inside an operation they share a loop over ``total`` tasks by one of
six schedules; ``begin`` and ``chunk`` deal it out and count what they hand to whom.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import target
from .memory import atomic_add, atomic_load, atomic_replace, atomic_store, call, int64_at, record, record_pointer

STATIC, DYNAMIC, GUIDED, NESTED, TILED, STEAL = range(6)
SCHEDULES = ("static", "dynamic", "guided", "nested", "tiled", "steal")

# Words of a team; those that several threads write lie on lines of their own.
THREADS, SPINS, OPERATIONS, COUNT = 0, 1, 2, 3
GENERATION, ARRIVED, PHASE, STOP, NEXT = 8, 16, 24, 32, 40
GROUPS = 48                     # a line for each group of nested loops: its counter
MEMBER_WORDS = 16
# Words of a member, behind a line for every group: what is left of its range; then its own counters.
RANGE, CHUNK, TASKS, STEALS, LOST, SCRATCH, WAITS, GROUP_RANGE = 0, 8, 9, 10, 11, 12, 13, 14

WORK = record("schedule", "min_chunk", "max_chunk", "tasks_per_thread", "groups", "tile_rows", "tile_tokens")

@intrinsic
def work_at(typing_context, where):
    """A pointer to WORK records."""
    return record_pointer(WORK)


_YIELDS, _NAPS = 200, 20
_SHORT_NAP, _LONG_NAP = 50, 500                 # microseconds


def words(threads: int) -> int:
    """Words of a team."""
    return GROUPS + 8 * threads + MEMBER_WORDS * threads


@intrinsic
def _pause(typing_context):
    """Tells the core that this is a waiting loop."""
    def codegen(context, builder, signature, arguments):
        if target.is_x86():
            name = "llvm.x86.sse2.pause"
            function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()
    return types.void(), codegen


def _libc(builder, name, arguments):
    kinds = [ir.IntType(32)] * len(arguments)
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(ir.IntType(32), kinds), name)
    builder.call(function, arguments)


@intrinsic
def _give_way(typing_context):
    """sched_yield(2)."""
    def codegen(context, builder, signature, arguments):
        _libc(builder, "sched_yield", [])
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def _nap(typing_context, microseconds):
    """usleep(3)."""
    def codegen(context, builder, signature, arguments):
        _libc(builder, "usleep", [builder.trunc(arguments[0], ir.IntType(32))])
        return context.get_dummy_value()
    return types.void(types.int64), codegen


@njit(cache=True)
def _wait(where, value, spins, stop):
    """Waits until the word at ``where`` is no longer ``value`` (or the one at ``stop`` no longer 0).

    Spins briefly, then gives the core to whoever wants it, then sleeps: a core that falls asleep lets the kernel move a thread to
    it that was displaced from its own. Returns whether it had to do more than spin.
    """
    for _ in range(spins):
        if atomic_load(where) != value:
            return 0
        _pause()
    turns = 0
    while atomic_load(where) == value and atomic_load(stop) == 0:
        if turns < _YIELDS:
            _give_way()
        else:
            _nap(_SHORT_NAP if turns < _YIELDS + _NAPS else _LONG_NAP)
        turns += 1
    return 1


@njit(cache=True)
def member_words(team, member):
    """Address of a member's words."""
    return team + 8 * (GROUPS + 8 * int64_at(team)[THREADS] + MEMBER_WORDS * member)


@njit(cache=True)
def barrier(team, member):
    """Waits for all threads of the team; the last one readies the shared counters for the next loop."""
    threads = int64_at(team)[THREADS]
    if threads == 1:
        int64_at(team)[NEXT] = 0
        int64_at(team)[GROUPS] = 0
        return
    phase = atomic_load(team + 8 * PHASE)
    if atomic_add(team + 8 * ARRIVED, 1) + 1 == threads:
        shared = int64_at(team)
        shared[NEXT] = 0
        for group in range(threads):
            shared[GROUPS + 8 * group] = 0
        atomic_store(team + 8 * ARRIVED, 0)
        atomic_store(team + 8 * PHASE, phase + 1)
    else:
        late = _wait(team + 8 * PHASE, phase, int64_at(team)[SPINS], team + 8 * STOP)
        int64_at(member_words(team, member))[WAITS] += late


@njit(cache=True)
def _execute(team, member, operations, count):
    table = int64_at(operations)
    for i in range(count):
        call(table[2 * i], member, table[2 * i + 1])
        barrier(team, member)


@njit(cache=True, nogil=True)
def run(team, operations, count, status):
    """Runs a program as member 0 of a team: ``count`` operations, pairs of (function, record). Returns the number of the first
    operation whose word of ``status`` is set afterwards, or -1."""
    shared = int64_at(team)
    if shared[THREADS] > 1:
        shared[OPERATIONS], shared[COUNT] = operations, count
        atomic_add(team + 8 * GENERATION, 1)
    _execute(team, 0, operations, count)
    flags = int64_at(status)
    for i in range(count):
        if flags[i] != 0:
            return i
    return -1


@njit(cache=True, nogil=True)
def serve(team, member):
    """Runs what member 0 starts, until the team is stopped."""
    shared = int64_at(team)
    seen = np.int64(0)
    while True:
        _wait(team + 8 * GENERATION, seen, shared[SPINS], team + 8 * STOP)
        if atomic_load(team + 8 * STOP) != 0:
            return
        seen += 1
        _execute(team, member, shared[OPERATIONS], shared[COUNT])


@njit(cache=True)
def _packed(first, last):
    return np.int64(first) | (np.int64(last) << np.int64(32))


@njit(cache=True)
def _first(packed):
    return packed & np.int64(0xFFFFFFFF)


@njit(cache=True)
def _last(packed):
    return packed >> np.int64(32)


@njit(cache=True)
def group_of(member, threads, groups):
    """The group of a member, and its first and last + 1 member."""
    group = member * groups // threads
    first = (group * threads + groups - 1) // groups
    last = ((group + 1) * threads + groups - 1) // groups
    return group, first, last


@njit(cache=True)
def begin(team, member, work, total):
    """Readies a member's share of a loop over ``total`` tasks. ``work``: the distribution, a record WORK.

    With ``steal``, the size of chunks follows what the last loop saw: half of it after a theft, twice of it without. A RANGE is
    always used up in its loop: a member that comes early to the next one must not find anything to steal in it.
    """
    own, threads = int64_at(member_words(team, member)), int64_at(team)[THREADS]
    own_range = member_words(team, member) + 8 * RANGE
    if work.schedule == NESTED:
        # The outer level: a group's range, dealt out inside it.
        group, first, last = group_of(member, threads, max(1, min(work.groups, threads)))
        own[GROUP_RANGE] = _packed(total * first // threads, total * last // threads)
    if work.schedule == STATIC or work.schedule == STEAL:
        atomic_store(own_range, _packed(total * member // threads, total * (member + 1) // threads))
    if work.schedule == STEAL:
        usual = max(1, total // (threads * work.tasks_per_thread))
        size = own[CHUNK] if own[CHUNK] > 0 else usual
        size = max(1, size // 2) if atomic_load(member_words(team, member) + 8 * LOST) > 0 else size * 2
        atomic_store(member_words(team, member) + 8 * LOST, 0)
        own[CHUNK] = min(max(size, work.min_chunk), work.max_chunk)


@njit(cache=True)
def chunk(team, member, work, total):
    """The next tasks of a member, first and last + 1; (0, 0) when there are none left."""
    first, last = _chunk(team, member, work, total)
    int64_at(member_words(team, member))[TASKS] += last > first
    return first, last


@njit(cache=True)
def _chunk(team, member, work, total):
    threads = int64_at(team)[THREADS]
    usual = max(1, total // (threads * work.tasks_per_thread))
    size = min(max(usual, work.min_chunk), work.max_chunk)
    if work.schedule == DYNAMIC or work.schedule == TILED:
        first = atomic_add(team + 8 * NEXT, size)
        return (first, min(first + size, total)) if first < total else (0, 0)
    if work.schedule == GUIDED:
        return _guided(team, work, total, threads)
    own = member_words(team, member) + 8 * RANGE
    if work.schedule == NESTED:
        group, _, _ = group_of(member, threads, max(1, min(work.groups, threads)))
        whole = int64_at(member_words(team, member))[GROUP_RANGE]
        first = _first(whole) + atomic_add(team + 8 * (GROUPS + 8 * group), size)
        return (first, min(first + size, _last(whole))) if first < _last(whole) else (0, 0)
    if work.schedule == STEAL:
        return _own_or_stolen(team, member, threads)
    whole = atomic_load(own)
    atomic_store(own, _packed(0, 0))
    return _first(whole), _last(whole)


@njit(cache=True)
def _guided(team, work, total, threads):
    """A share of what is left: large chunks first, small ones at the end."""
    while True:
        first = atomic_load(team + 8 * NEXT)
        if first >= total:
            return 0, 0
        size = min(max((total - first) // (2 * threads), work.min_chunk), work.max_chunk, total - first)
        if atomic_replace(team + 8 * NEXT, first, first + size):
            return first, first + size


@njit(cache=True)
def _own_or_stolen(team, member, threads):
    """A chunk from the front of the own range, or half of what another member has left, from its end."""
    mine = member_words(team, member)
    own = int64_at(mine)
    while True:
        whole = atomic_load(mine + 8 * RANGE)
        first, last = _first(whole), _last(whole)
        if first >= last:
            break
        stop = min(first + max(own[CHUNK], 1), last)
        if atomic_replace(mine + 8 * RANGE, whole, _packed(stop, last)):
            return first, stop
    for step in range(1, threads):
        victim = member_words(team, (member + step) % threads)
        whole = atomic_load(victim + 8 * RANGE)
        first, last = _first(whole), _last(whole)
        if first >= last:
            continue
        middle = first + (last - first) // 2
        if atomic_replace(victim + 8 * RANGE, whole, _packed(first, middle)):
            own[STEALS] += 1
            atomic_add(victim + 8 * LOST, 1)
            stop = min(middle + max(own[CHUNK], 1), last)
            atomic_store(mine + 8 * RANGE, _packed(stop, last))
            return middle, stop
    return 0, 0
