"""The largest logits of rows, and the sums of their softmax weights, on the CPU, by segments of the vocabulary.

Both are integers, whose maxima and sums are the same in any order: over segments, threads and ranks.
"""

import numpy as np
from numba import carray, njit
from numba.extending import intrinsic

from ..numerics import FIXED
from ..sampling import NOTHING, SEGMENT
from .functions import exp
from .memory import float32_at, int32_at, int64_at, record, record_pointer
from .operation import operation
from .simd import float_from_bits, rint
from .team import begin, chunk, work_at

# logits: float32 [rows, stride] of tokens ``first`` …; best, totals: int64 [rows, segments]; rows: an int64.
LOGITS = record("team", "status", "work", "rows", "logits", "stride", "columns", "first", "segments", "best", "totals")


@intrinsic
def _logits_at(typing_context, where):
    return record_pointer(LOGITS)


@njit(cache=True)
def weigh(logits, weights):
    """weights[i] = rint(exp(logits[i] - maximum) * 2**32) as int64 for float32 logits [V]; returns (maximum, sum)."""
    maximum = logits[0]
    for i in range(logits.shape[0]):
        maximum = max(maximum, logits[i])
    total = np.int64(0)
    for i in range(logits.shape[0]):
        weight = np.int64(rint(exp(logits[i] - maximum) * FIXED))
        weights[i] = weight
        total += weight
    return maximum, total


@njit(cache=True)
def _ascending(bits):
    """Integers in the order of the float32 with these bits; those of -0 and 0 are equal, and the map is its own inverse."""
    return np.int32(-0x80000000) - bits if bits < 0 else bits


@njit(cache=True)
def _best(bits, count, first):
    """The greatest key of ``count`` logits: the logit in the upper half, below it the token, greatest for the lowest id."""
    largest = NOTHING
    for i in range(count):
        key = (np.int64(_ascending(bits[i])) << np.int64(32)) | (np.int64(0x7FFFFFFF) - np.int64(first + i))
        largest = max(largest, key)
    return largest


@njit(cache=True)
def _total(logits, count, maximum):
    """The sum of rint(exp(l - maximum) * 2**32) over ``count`` logits."""
    total = np.int64(0)
    for i in range(count):
        total += np.int64(rint(exp(logits[i] - maximum) * FIXED))
    return total


@operation
def best_operation(member, where):
    """best[row, segment] = the greatest key of the segment: its largest logit, of equals the one with the lowest id."""
    op = carray(_logits_at(where), 1)[0]
    work, total, best = carray(work_at(op.work), 1)[0], int64_at(op.rows)[0] * op.segments, int64_at(op.best)
    begin(op.team, member, work, total)
    start, stop = chunk(op.team, member, work, total)
    while stop > start:
        for task in range(start, stop):
            row, column = task // op.segments, task % op.segments * SEGMENT
            best[task] = _best(int32_at(op.logits + 4 * (row * op.stride + column)), min(SEGMENT, op.columns - column),
                               op.first + column)
        start, stop = chunk(op.team, member, work, total)


@operation
def totals_operation(member, where):
    """totals[row, segment] = the sum of the segment's weights relative to the row's largest logit, which ``best`` tells."""
    op = carray(_logits_at(where), 1)[0]
    work, total = carray(work_at(op.work), 1)[0], int64_at(op.rows)[0] * op.segments
    best, totals = int64_at(op.best), int64_at(op.totals)
    begin(op.team, member, work, total)
    start, stop = chunk(op.team, member, work, total)
    while stop > start:
        for task in range(start, stop):
            row, column = task // op.segments, task % op.segments * SEGMENT
            largest = NOTHING
            for segment in range(op.segments):
                largest = max(largest, best[row * op.segments + segment])
            maximum = float_from_bits(_ascending(np.int32(largest >> np.int64(32))))
            logits = float32_at(op.logits + 4 * (row * op.stride + column))
            totals[task] = _total(logits, min(SEGMENT, op.columns - column), maximum)
        start, stop = chunk(op.team, member, work, total)
