"""Operations that join what several processes have computed in parts, through memory that they share: no call of a library.

A process writes its part, all meet, then each reads all parts. A part may be written again once its writer has met the others
once more: everybody has read it by then. The words of a meeting point lie in shared memory, its waiting threads sleep on them.
All joins are of integers, so their result is the same in any order.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ..numerics import OUT_OF_RANGE, OUTPUT_LIMIT, UNFIXED
from .memory import atomic_add, atomic_load, atomic_or, atomic_store, float32_at, int32_at, int64_at, record, record_pointer
from .operation import operation
from .team import SCRATCH, begin, chunk, member_words, work_at
from .waiting import advance, wait_unless

SUM, MAXIMUM, BITS, FINISH, OWNED = range(5)
ARRIVED, PHASE, MEETING_WORDS = 0, 8, 16        # words of a meeting point: each on a line of its own; behind PHASE its sleepers
STEP = 512                      # numbers of a task
GONE = 1 << 62                  # status of a meeting to which not all will come; no fault of a tensor

# meeting: address of a meeting point of ``ranks`` processes; spins: looks at it before sleeping; spent: an int64, nanoseconds;
# alarm: address of what ends the waiting (see ``waiting.Alarm``), or 0.
MEETING = record("team", "status", "work", "meeting", "ranks", "spins", "spent", "alarm")
# parts: int64 addresses [ranks] of arrays [rows, columns]: int64, for BITS float32; rows: an int64. target: what SUM and MAXIMUM
# (int64) and BITS (float32) make of them, FINISH adds to: float32 [rows, columns]; bias: float32 [columns], or 0; offset: an
# int64, the first of the rows, or 0. OWNED: the rows from rows * rank // ranks on are in the part of that rank alone; rank: the
# number of this one, whose part is the target itself.
JOIN = record("team", "status", "work", "rows", "columns", "parts", "ranks", "kind", "target", "bias", "spent",
              "offset", "rank")


@intrinsic
def _meeting_at(typing_context, where):
    return record_pointer(MEETING)


@intrinsic
def _join_at(typing_context, where):
    return record_pointer(JOIN)


@intrinsic
def _monotonic(typing_context):
    """clock_gettime(2), CLOCK_MONOTONIC, in nanoseconds."""
    def codegen(context, builder, signature, arguments):
        word = ir.IntType(64)
        pair = builder.alloca(word, 2)
        kinds = [ir.IntType(32), word.as_pointer()]
        name = "clock_gettime"
        function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(ir.IntType(32), kinds), name)
        builder.call(function, [ir.IntType(32)(1), pair])
        seconds, rest = (builder.load(builder.gep(pair, [word(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, word(1_000_000_000)), rest)
    return types.int64(), codegen


@njit(cache=True)
def meet(meeting, ranks, spins, alarm):
    """Waits until so many have come to the meeting point, or the alarm rings: then nobody meets there any more. Returns whether
    it rings."""
    phase = atomic_load(meeting + 8 * PHASE)
    if atomic_add(meeting + 8 * ARRIVED, 1) + 1 == ranks:
        atomic_store(meeting + 8 * ARRIVED, 0)
        advance(meeting + 8 * PHASE)
        return False
    return wait_unless(meeting + 8 * PHASE, phase, spins, alarm)


@operation
def meet_operation(member, where):
    """The first member of the team meets other processes; the barrier behind the operation holds the rest of the team."""
    op = carray(_meeting_at(where), 1)[0]
    if member == 0:
        start = _monotonic()
        if meet(op.meeting, op.ranks, op.spins, op.alarm):
            atomic_or(op.status, GONE)
        int64_at(op.spent)[0] += _monotonic() - start


@njit(cache=True)
def _joined(op, at, count, total):
    """total[:count] = the sums, or maxima, of the parts' numbers from ``at`` on."""
    part = int64_at(int64_at(op.parts)[0] + 8 * at)
    for i in range(count):
        total[i] = part[i]
    for rank in range(1, op.ranks):
        part = int64_at(int64_at(op.parts)[rank] + 8 * at)
        if op.kind == MAXIMUM:
            for i in range(count):
                total[i] = max(total[i], part[i])
        else:
            for i in range(count):
                total[i] += part[i]


@njit(cache=True)
def _bits(op, at, count):
    """The float32 of which at most one part has a nonzero one: their bits are added."""
    target = int32_at(op.target + 4 * at)
    part = int32_at(int64_at(op.parts)[0] + 4 * at)
    for i in range(count):
        target[i] = part[i]
    for rank in range(1, op.ranks):
        part = int32_at(int64_at(op.parts)[rank] + 4 * at)
        for i in range(count):
            target[i] += part[i]


@njit(cache=True)
def _copy_owned(op, rows, row, at, count):
    """target = the numbers of a row from its owner's part, unless this rank is the owner itself."""
    owner = ((row + 1) * op.ranks - 1) // rows
    if owner != op.rank:
        target, part = int32_at(op.target + 4 * at), int32_at(int64_at(op.parts)[owner] + 4 * at)
        for i in range(count):
            target[i] = part[i]


@njit(cache=True)
def _finish(sums, count, residual, bias, biased):
    """residual += float32(sums * 2**-32) + bias; returns OUT_OF_RANGE or 0."""
    beyond = False
    for i in range(count):
        y = np.float32(np.float64(sums[i]) * UNFIXED)
        beyond |= not abs(y) < OUTPUT_LIMIT
        residual[i] += y + bias[i] if biased else y
    return OUT_OF_RANGE if beyond else 0


@operation
def join_operation(member, where):
    """Joins the parts. Tasks: rows x pieces of ``STEP`` columns."""
    op = carray(_join_at(where), 1)[0]
    start = _monotonic() if member == 0 else 0
    work, pieces, status = carray(work_at(op.work), 1)[0], (op.columns + STEP - 1) // STEP, 0
    total = int64_at(int64_at(member_words(op.team, member))[SCRATCH])
    tasks, shift = int64_at(op.rows)[0] * pieces, int64_at(op.offset)[0] * op.columns if op.offset else 0
    begin(op.team, member, work, tasks)
    first, last = chunk(op.team, member, work, tasks)
    while last > first:
        for task in range(first, last):
            column = task % pieces * STEP
            at, count = shift + task // pieces * op.columns + column, min(STEP, op.columns - column)
            if op.kind == OWNED:
                _copy_owned(op, int64_at(op.rows)[0], task // pieces, at, count)
            elif op.kind == BITS:
                _bits(op, at, count)
            elif op.kind == FINISH:
                _joined(op, at, count, total)
                status |= _finish(total, count, float32_at(op.target + 4 * at), float32_at(op.bias + 4 * column), op.bias != 0)
            else:
                _joined(op, at, count, int64_at(op.target + 8 * at))
        first, last = chunk(op.team, member, work, tasks)
    if status:
        atomic_or(op.status, status)
    if member == 0:
        int64_at(op.spent)[0] += _monotonic() - start
