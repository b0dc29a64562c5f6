"""What one step of a stage computes: programs of kernels, and the exact sums over the tensor group between them."""

import time
from collections.abc import Callable

import numpy as np

from llama_hpc.comm.exchange import Call, Exchange
from llama_hpc.comm.reduce import Region, TensorReducer
from llama_hpc.errors import RankLost
from llama_hpc.kernels.cpu import joining
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
from llama_hpc.model.faults import Faults, place_of


class Steps:
    """Built once by the layers of a stage; ``run`` is collective over the tensor group.

    With one tensor rank, or ranks that share memory, everything is one program, one compiled call. ``counts`` int64: rows,
    outputs and attention runs of the step, the first of this rank's own rows and their number.

    ``spread``: sequence parallelism (Korthikanti et al. 2022). Each rank has its own rows of the residual only; norms and
    quantisation run for them, and sums over ranks are finished for them.
    """

    def __init__(self, pool: Pool, reducer: TensorReducer, faults: Faults, schedule: str = "steal", spread: bool = False):
        self.pool, self.reducer, self.faults, self.schedule, self.spread = pool, reducer, faults, schedule, spread
        self.counts = np.zeros(5, np.int64)
        self.rows, self.outputs, self.runs, self.first, self.own = (self.counts[i : i + 1] for i in range(5))
        self.program = Program(pool)
        self.programs = [self.program]
        # Behind each program but the last: of how many rows, and whose time it takes.
        self._exchanges: list[tuple[Exchange, np.ndarray, TensorReducer]] = []
        self._started = Exchange(), reducer
        self._joined: list[tuple[TensorReducer, int, int, np.ndarray]] = []     # numbers and bytes of a row, how many rows

    def join(self, region: Region, kind: int, count: np.ndarray, target: np.ndarray, bias: np.ndarray | None = None,
             name=(0, ()), reducer: TensorReducer | None = None) -> None:
        """Appends the join of ``region[:count]``, of which operations before it write this rank's part, into ``target``.

        ``kind``: see ``joining``; ``count``: one of the views of ``counts``; ``reducer``: that of the region, if another one.
        """
        reducer = reducer or self.reducer
        self.bring_together(region, kind, count, reducer)
        if region.own is not target:
            self.add_join(region.parts, kind, count, target, bias, name, reducer=reducer)

    def bring_together(self, region: Region, kind: int, count: np.ndarray, reducer: TensorReducer) -> None:
        """Appends the part of a join after which ``region.parts`` are all that is left to join."""
        reducer.bring_together(self, region, kind, count)
        self._note_join(region.own, count, reducer)

    def _note_join(self, array: np.ndarray, count: np.ndarray, reducer: TensorReducer | None = None) -> None:
        self._joined.append((reducer or self.reducer, array[:1].size, array[:1].nbytes, count))

    def add_sums(self, region: Region, residual: np.ndarray, bias: np.ndarray | None, name) -> None:
        """Appends what adds the sums of all ranks to the residual, in ``spread`` steps to this rank's own rows."""
        if not self.spread:
            self.join(region, joining.FINISH, self.rows, residual, bias, name)
            return
        parts = region.parts
        if self.reducer.shares_memory:
            self.reducer.meet(self)
        else:
            self.exchange(Call(self.reducer.scatter_sum, region.own), self.rows)
            parts = np.array([address(region.own)])
        self._note_join(region.own, self.rows)
        self.add_join(parts, joining.FINISH, self.own, residual, bias, name, offset=self.first)

    def spread_out(self, arrays: list[np.ndarray]) -> None:
        """Appends what lets all ranks have the rows that each has computed of arrays [rows, …], which may be common memory."""
        if self.reducer.shares_memory:
            self.reducer.meet(self)
            return
        for array in arrays:
            self.exchange(Call(self.reducer.gather_rows, array), self.rows)
            self._note_join(array, self.own)

    def gather_residual(self, region: Region) -> None:
        """Appends what completes the residual, which is ``region.own``, on every rank."""
        if not self.reducer.shares_memory:
            self.spread_out([region.own])
            return
        self.reducer.meet(self)
        self.add_join(region.parts, joining.OWNED, self.rows, region.own, rank=self.reducer.comm.rank)
        # The next step may begin by writing to it.
        self.reducer.meet(self)

    def add_join(self, parts: np.ndarray, kind: int, count: np.ndarray, target: np.ndarray, bias=None, name=(0, ()),
                 reducer: TensorReducer | None = None, **more) -> None:
        """Appends the operation that joins parts, given by their addresses."""
        self.program.add(name, joining.join_operation, joining.JOIN, ONE_TASK.record(self.pool.threads), rows=count,
                         columns=target.shape[1], parts=parts, ranks=len(parts), kind=kind, target=target, bias=bias,
                         spent=(reducer or self.reducer).nanoseconds, **more)

    def meet(self, meeting: dict[str, int]) -> None:
        """Appends a meeting of processes that share memory."""
        self.program.add((0, ()), joining.meet_operation, joining.MEETING, ONE_TASK.record(self.pool.threads), **meeting)

    def exchange(self, exchange: Exchange, count: np.ndarray, reducer: TensorReducer | None = None) -> None:
        """Ends the program here: the exchange of ``count`` rows, then the next one runs."""
        self._exchanges.append((exchange, count, reducer or self.reducer))
        self.program = Program(self.pool)
        self.programs.append(self.program)

    def run(self) -> None:
        """One step; what kernels find wrong goes to ``faults``."""
        for i, program in enumerate(self.programs):
            self._compute(program)
            if i < len(self._exchanges):
                exchange, count, reducer = self._exchanges[i]
                self._alone(reducer, exchange.run, int(count[0]))
        self._count_joins()

    def _compute(self, program: Program, between: Callable[[], None] | None = None) -> None:
        if program.names and program.run(between) >= 0:
            self._note(program)

    @staticmethod
    def _alone(reducer: TensorReducer, function: Callable, *arguments) -> None:
        """Calls a function, in whose time this rank does nothing else."""
        start = time.monotonic_ns()
        function(*arguments)
        reducer.nanoseconds[0] += time.monotonic_ns() - start

    def _take_turn(self, number: int, between: Callable[[], None]) -> None:
        """The end of the exchange before program ``number``, the program, the start of the exchange behind it."""
        if number:
            exchange, _, reducer = self._exchanges[number - 1]
            self._alone(reducer, exchange.wait)
        self._compute(self.programs[number], between)
        if number < len(self._exchanges):
            exchange, count, reducer = self._exchanges[number]
            self._alone(reducer, exchange.start, int(count[0]))
            self._started = exchange, reducer

    def _test(self) -> None:
        """Lets what was started last get on."""
        exchange, reducer = self._started
        self._alone(reducer, exchange.test)

    def find(self, place: int) -> str | None:
        """The operation at such a place of ``Pool.reached`` in words; None where it is not of these steps. From any thread."""
        where = "the start"
        for program in self.programs:
            number = program.find(place)
            named = [name for name in program.names[: None if number is None else number + 1] if name[1]]
            where = place_of(*named[-1]) if named else where
            if number is not None:
                return where if program.names[number][1] else f"{program.kinds[number]} behind {where}"
        return None

    def _count_joins(self) -> None:
        for reducer, numbers, size, count in self._joined:
            reducer.calls += 1
            reducer.numbers += numbers * int(count[0])
            reducer.bytes += size * int(count[0])

    def _note(self, program: Program) -> None:
        """The first fault of a program: two bits for each of the tensors that an operation is named after.

        Raises RankLost where a meeting was given up.
        """
        for (layer, tensors), status in zip(program.names, program.status.tolist(), strict=True):
            if status == joining.GONE:
                raise RankLost("a rank of this tensor group is gone")
            for place, tensor in enumerate(tensors):
                found = status >> (2 * place) & 3
                if found:
                    # Both bits: not finite, which comes first.
                    self.faults.note(1 if found == 3 else found, tensor, layer)
        program.clear()

    @staticmethod
    def run_in_turns(first: "Steps", second: "Steps") -> None:
        """One step of each, which have equally many exchanges: while one's are under way, a program of the other runs.

        Collective over the tensor group. A program of ``second`` may read what the same one of ``first`` has written, and those
        before; nothing else of one may be written by the other.
        """
        for number in range(len(first.programs)):
            first._take_turn(number, second._test)
            second._take_turn(number, first._test)
        for steps in (first, second):
            steps._count_joins()
            steps.reducer.overlapped += len(steps._joined)
