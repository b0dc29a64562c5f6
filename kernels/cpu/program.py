"""Programs: operations that a pool runs one after the other, in one compiled call."""

from collections.abc import Callable

import numpy as np

from .memory import address
from .workers import Pool


class Program:
    """A list of operations for one pool. ``add`` builds it; ``run`` runs all of it.

    ``status`` int64 [operations] holds what each operation found, 0 for nothing; ``clear`` resets it.
    """

    def __init__(self, pool: Pool):
        self.pool, self.names, self.kinds = pool, [], []
        self.status = np.zeros(0, np.int64)
        self._kept: list = []
        self._functions: list[int] = []
        self.records: list[np.ndarray] = []
        self._table: np.ndarray | None = None

    def add(self, name, function, dtype: np.dtype, work, keep=(), **fields) -> None:
        """Appends an operation: a cfunc and its record. ``fields`` are addresses, integers or arrays (their address is taken).

        ``work`` is a record of a WorkDistribution; ``name`` is given back for a status, and ``kinds`` has the function's. Arrays
        are kept alive, ``keep`` too.
        """
        record = np.zeros(1, dtype)
        record["team"], record["work"] = self.pool.address, address(work)
        for field, value in fields.items():
            record[field] = address(value) if isinstance(value, np.ndarray) or value is None else value
        self._kept += [function, work, *fields.values(), *keep]
        self._functions.append(function.address)
        self.records.append(record)
        self.names.append(name)
        self.kinds.append(function.function.__name__.removesuffix("_operation"))
        self._table = None

    def _finish(self) -> None:
        self.status = np.zeros(len(self.records), np.int64)
        self._table = np.zeros((len(self.records), 2), np.int64)
        for i, (function, record) in enumerate(zip(self._functions, self.records, strict=True)):
            record["status"] = address(self.status) + 8 * i
            self._table[i] = function, address(record)
        self._arguments = address(self._table), len(self.records), address(self.status)

    def run(self, between: Callable[[], None] | None = None) -> int:
        """Runs all operations; returns the number of the first whose status is set, or -1. One program of a pool at a time.

        ``between``: called behind each operation.
        """
        if self._table is None:
            self._finish()
        if between is None:
            return self.pool.execute(*self._arguments)
        (table, count, status), first = self._arguments, -1
        for i in range(count):
            if self.pool.execute(table + 16 * i, 1, status + 8 * i) >= 0 and first < 0:
                first = i
            between()
        return first

    def find(self, place: int) -> int | None:
        """The number of the operation that stands at such a place of ``Pool.reached``; None where it is not of this program."""
        if self._table is None or not 0 <= place - address(self._table) < self._table.nbytes:
            return None
        return (place - address(self._table)) // 16

    def clear(self) -> None:
        """Forgets what was found."""
        self.status[:] = 0
