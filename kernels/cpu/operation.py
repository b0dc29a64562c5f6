"""Operations: functions that a team of threads runs, compiled when a program first needs them; and what was compiled here."""

import sys
from collections.abc import Callable
from functools import cached_property

from numba import cfunc, types
from numba.core.dispatcher import Dispatcher

_PACKAGE = __package__.rpartition(".")[0] + "."


class Operation:
    """A function of a member's number and the address of a record, which calls compiled code only.

    It is compiled, or loaded from the disk cache, when its ``address`` is first asked for: a run pays for what it uses.
    """

    def __init__(self, function: Callable[[int, int], None]):
        self.function, self.__doc__ = function, function.__doc__

    @cached_property
    def _compiled(self):
        return cfunc(types.void(types.intp, types.intp), cache=True)(self.function)

    @property
    def address(self) -> int:
        """Of its C function."""
        return self._compiled.address

    def counts(self) -> tuple[int, int]:
        """How often it was compiled, and loaded, by this process: one of them once, or none."""
        if "_compiled" not in vars(self):
            return 0, 0
        loaded = self._compiled.cache_hits
        return 1 - loaded, loaded


def operation(function: Callable[[int, int], None]) -> Operation:
    """Decorator: makes a function an ``Operation``."""
    return Operation(function)


def compiled() -> int:
    """Kernels that this process has compiled, with every set of types counted: those that the disk cache did not have."""
    return sum(count for count, _ in _counts())


def loaded() -> int:
    """Kernels that this process has loaded from the disk cache."""
    return sum(count for _, count in _counts())


def _counts():
    modules = [module for name, module in sys.modules.items() if name.startswith(_PACKAGE)]
    found = {id(value): value for module in modules for value in vars(module).values()}
    for value in found.values():
        if isinstance(value, Operation):
            yield value.counts()
        elif isinstance(value, Dispatcher):
            yield sum(value.stats.cache_misses.values()), sum(value.stats.cache_hits.values())
