"""Where memory lies on a node with several NUMA domains: on that of the thread that first writes to it, as Linux has it.

So fresh memory is zeroed by the threads of a pool, each its part of it.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from .memory import int8_at, int64_at, record, record_pointer
from .operation import operation
from .program import Program
from .team import TASKS, THREADS, begin, chunk, member_words, work_at
from .workers import NumaHint, Pool, WorkDistribution

PAGE = 2 << 20                  # bytes of a huge page, which the system may use for large arrays
TOUCH = record("team", "status", "work", "data", "size", "unit", "interleaved")


@intrinsic
def _touch_at(typing_context, where):
    return record_pointer(TOUCH)


@njit(cache=True)
def _zero(where, count):
    data = int8_at(where)
    for i in range(count):
        data[i] = 0


@operation
def touch_operation(member, where):
    """Zeroes ``size`` bytes: units of ``unit`` bytes as a loop over them is shared out, or pages by turns."""
    op = carray(_touch_at(where), 1)[0]
    if op.interleaved:
        threads, page = int64_at(op.team)[THREADS], op.data // PAGE
        while page * PAGE < op.data + op.size:
            if page % threads == member:
                first = max(page * PAGE, op.data)
                _zero(first, min((page + 1) * PAGE, op.data + op.size) - first)
                int64_at(member_words(op.team, member))[TASKS] += 1
            page += 1
        return
    work, units = carray(work_at(op.work), 1)[0], (op.size + op.unit - 1) // op.unit
    begin(op.team, member, work, units)
    first, last = chunk(op.team, member, work, units)
    while last > first:
        _zero(op.data + first * op.unit, min(last * op.unit, op.size) - first * op.unit)
        first, last = chunk(op.team, member, work, units)


def touch(pool: Pool, array: np.ndarray, unit: int, numa: NumaHint) -> None:
    """Zeroes fresh contiguous memory. ``local``: of the tasks of a loop, ``unit`` bytes each, every member touches those that a
    ``static`` schedule gives it (and ``steal`` first); ``interleaved``: pages by turns."""
    program = Program(pool)
    program.add("touch", touch_operation, TOUCH, WorkDistribution("static").record(pool.threads), data=array, size=array.nbytes,
                unit=unit, interleaved=int(numa.policy == "interleaved"))
    program.run()
