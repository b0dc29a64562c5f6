"""A loop that notes what a schedule does with it, for tests of worker pools."""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from llama_hpc.kernels.cpu.memory import atomic_add, atomic_load, int64_at, record, record_pointer
from llama_hpc.kernels.cpu.operation import operation
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.team import THREADS, begin, chunk, work_at
from llama_hpc.kernels.cpu.waiting import nap

TRACE = record("team", "status", "work", "total", "hits", "owners", "sizes", "mode", "gate")
PLAIN, SLOW, LATE, TOGETHER = range(4)


@intrinsic
def _trace_at(typing_context, where):
    return record_pointer(TRACE)


@njit(cache=True)
def _until(where, value):
    while atomic_load(where) < value:
        nap(50)


@operation
def trace_operation(member, where):
    """Notes who did a task and how large the chunk was that began with it.

    SLOW: the first member begins before the others, and is held at task 0 until somebody has done the last task of its range.
    LATE: it does not even begin until then. TOGETHER: nobody ends its range before all have come to its end, so that nothing is
    left to steal.
    """
    op = carray(_trace_at(where), 1)[0]
    work, threads = carray(work_at(op.work), 1)[0], int64_at(op.team)[THREADS]
    if op.mode == SLOW and member:
        _until(op.hits, 1)
    if op.mode == LATE and not member:
        _until(op.hits + 8 * (op.total // threads - 1), 1)
    begin(op.team, member, work, op.total)
    first, last = chunk(op.team, member, work, op.total)
    while last > first:
        int64_at(op.sizes)[first] = last - first
        for task in range(first, last):
            atomic_add(op.hits + 8 * task, 1)
            int64_at(op.owners)[task] = member
            if op.mode == SLOW and task == 0:
                _until(op.hits + 8 * (op.total // threads - 1), 1)
            if op.mode == TOGETHER and task + 1 == op.total * (member + 1) // threads:
                atomic_add(op.gate, 1)
                _until(op.gate, threads)
        first, last = chunk(op.team, member, work, op.total)


class Trace:
    """A traced loop on a pool: ``run`` it, then look at ``hits`` and ``owners`` of tasks, ``sizes`` of chunks by first task."""

    def __init__(self, pool, work, total, mode=PLAIN, program=None, unit=1):
        self.program = program or Program(pool)
        self.hits, self.owners, self._sizes = (np.zeros(total + 1, np.int64) for _ in range(3))
        self._gate = np.zeros(1, np.int64)
        self.program.add("trace", trace_operation, TRACE, work.record(pool.threads, unit), total=total, hits=self.hits,
                         owners=self.owners, sizes=self._sizes, mode=mode, gate=self._gate)

    def run(self):
        for array in (self.hits, self._sizes, self._gate):
            array[:] = 0
        self.program.run()
        assert (self.hits[:-1] == 1).all()
        return self

    @property
    def sizes(self):
        return [int(size) for size in self._sizes if size]
