"""Waiting for a word that another thread, perhaps of another process, changes: spin briefly, then sleep until woken.

A waiting thread must not keep a core from the thread that it waits for, nor from other processes. It sleeps rather than yields:
beside a busy process, sched_yield(2) costs a whole slice of time, after which the others wait for who yielded.
Sleeping is futex(2); behind a word that is waited for lies the number of threads that sleep on it, so that changing it costs a
system call only where somebody sleeps.
"""

import ctypes
import platform
import time
from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import target
from .memory import address, aligned, atomic_add, atomic_load

# The system call's number where the low half of a word comes first in memory; elsewhere waiting threads take short naps.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}.get(platform.machine(), 0)
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1              # FUTEX_WAIT and FUTEX_WAKE, also between processes
_NAP = 100                                              # microseconds


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


def _libc(builder, name, result, arguments):
    kinds = [argument.type for argument in arguments]
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, kinds), name)
    builder.call(function, arguments)


@intrinsic
def nap(typing_context, microseconds):
    """usleep(3)."""
    def codegen(context, builder, signature, arguments):
        _libc(builder, "usleep", ir.IntType(32), [builder.trunc(arguments[0], ir.IntType(32))])
        return context.get_dummy_value()
    return types.void(types.int64), codegen


@intrinsic
def _futex(typing_context, where, operation, value, limit):
    """futex(2); ``limit``: address of a struct timespec, or 0 for no time limit."""
    def codegen(context, builder, signature, arguments):
        word = ir.IntType(64)
        where, operation, value, limit = arguments
        _libc(builder, "syscall", word, [word(_FUTEX), where, operation, value, limit, word(0), word(0)])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _call(typing_context, function):
    """Calls the C function void (*)(void) at an address."""
    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), [])
        return context.get_dummy_value()
    return types.void(types.int64), codegen


@njit(cache=True)
def wait(where, value, spins):
    """Waits until the word at ``where`` is no longer ``value``; returns whether it had to sleep."""
    for _ in range(spins):
        if atomic_load(where) != value:
            return 0
        _pause()
    sleepers = where + 8
    atomic_add(sleepers, 1)
    while atomic_load(where) == value:
        if _FUTEX:
            _futex(where, _WAIT, value, 0)
        else:
            nap(_NAP)
    atomic_add(sleepers, -1)
    return 1


@njit(cache=True)
def advance(where):
    """Adds 1 to a word and wakes who sleeps on it."""
    atomic_add(where, 1)
    if atomic_load(where + 8) > 0 and _FUTEX:
        _futex(where, _WAKE, _EVERYBODY, 0)


class Alarm:
    """What ends waits for other processes, of which one may be gone for ever: ``words`` int64, whether it rings, the address of
    the function that looks, and a struct timespec with the time between two looks.

    ``look`` returns whether there is a reason to ring; who waits calls it, in the waiting thread. Once it rings, waits end at
    once, and what they waited for is not there.
    """

    def __init__(self, look: Callable[[], bool], milliseconds: int = 20):
        self.words = aligned(4, "i8")
        self._reason = look
        self._function = ctypes.CFUNCTYPE(None)(self.look)
        self.words[:] = 0, ctypes.cast(self._function, ctypes.c_void_p).value, 0, milliseconds * 1_000_000
        self.address = address(self.words)

    @property
    def rings(self) -> bool:
        return bool(self.words[0])

    def look(self) -> bool:
        """Rings if there is a reason to; returns whether it rings."""
        self.words[0] |= bool(self._reason())
        return self.rings


@njit(cache=True)
def wait_unless(where, value, spins, alarm):
    """``wait``, which ends when the alarm at this address rings (0: there is none); returns whether it rings."""
    if not alarm:
        wait(where, value, spins)
        return False
    for _ in range(spins):
        if atomic_load(where) != value:
            return False
        _pause()
    sleepers = where + 8
    atomic_add(sleepers, 1)
    while atomic_load(where) == value and not atomic_load(alarm):
        if _FUTEX:
            _futex(where, _WAIT, value, alarm + 16)
        else:
            nap(_NAP)
        if atomic_load(where) == value:
            _call(atomic_load(alarm + 8))
    atomic_add(sleepers, -1)
    return atomic_load(alarm) != 0


@njit(cache=True)
def _spin(where, spins):
    for _ in range(spins):
        if atomic_load(where) != 0:
            return
        _pause()


@cache
def spins_in(seconds: float) -> int:
    """How many looks at a word take so long on this machine: the pause between two takes 10 to 150 cycles."""
    word, looks = aligned(1, "i8", 0), 2000
    _spin(address(word), 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _spin(address(word), looks)
        times.append(time.perf_counter() - start)
    return max(1, int(looks * seconds / min(times)))
