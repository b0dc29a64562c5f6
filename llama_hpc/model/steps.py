"""What one step of a stage computes: programs of kernels, and the exact sums over the tensor group between them."""

import time

import numpy as np

from llama_hpc.comm.reduce import Region, TensorReducer
from llama_hpc.kernels.cpu import joining
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.workers import ONE_TASK, Pool
from llama_hpc.model.faults import Faults


class Steps:
    """Built once by the layers of a stage; ``run`` is collective over the tensor group.

    With one tensor rank everything is one program, one compiled call. ``counts`` int64: rows, outputs and attention runs of the
    step.
    """

    def __init__(self, pool: Pool, reducer: TensorReducer, faults: Faults, schedule: str = "steal"):
        self.pool, self.reducer, self.faults, self.schedule = pool, reducer, faults, schedule
        self.counts = np.zeros(3, np.int64)
        self.rows, self.outputs, self.runs = (self.counts[i : i + 1] for i in range(3))
        self.program = Program(pool)
        self._actions: list = [self.program]
        self._joined: list[tuple[int, np.ndarray]] = []     # bytes a row, and how many rows

    def join(self, region: Region, kind: int, count: np.ndarray, target: np.ndarray, bias: np.ndarray | None = None,
             name=(0, ())) -> None:
        """Appends the join of ``region[:count]``, of which operations before it write this rank's part, into ``target``.

        ``kind``: see ``joining``; ``count``: one of the views of ``counts``.
        """
        self.reducer.bring_together(self, region, kind, count)
        self._joined.append((region.own[:1].nbytes, count))
        if region.own is not target:
            self.add_join(region.parts, kind, count, target, bias, name)

    def add_join(self, parts: np.ndarray, kind: int, count: np.ndarray, target: np.ndarray, bias=None, name=(0, ())) -> None:
        """Appends the operation that joins parts, given by their addresses."""
        self.program.add(name, joining.join_operation, joining.JOIN, ONE_TASK.record(self.pool.threads), rows=count,
                         columns=target.shape[1], parts=parts, ranks=len(parts), kind=kind, target=target, bias=bias,
                         spent=self.reducer.nanoseconds)

    def meet(self, meeting: dict[str, int]) -> None:
        """Appends a meeting of processes that share memory."""
        self.program.add((0, ()), joining.meet_operation, joining.MEETING, ONE_TASK.record(self.pool.threads), **meeting)

    def call(self, function, array: np.ndarray, count: np.ndarray) -> None:
        """Ends the program here: ``function(array[:count])`` is called, then the next one runs."""
        self.program = Program(self.pool)
        self._actions += [(function, array, count), self.program]

    @property
    def programs(self) -> list[Program]:
        return [action for action in self._actions if isinstance(action, Program)]

    def run(self) -> None:
        """One step; what kernels find wrong goes to ``faults``."""
        for action in self._actions:
            if isinstance(action, Program):
                if action.names and action.run() >= 0:
                    self._note(action)
            else:
                function, array, count = action
                start = time.monotonic_ns()
                function(array[: count[0]])
                self.reducer.nanoseconds[0] += time.monotonic_ns() - start
        self.reducer.calls += len(self._joined)
        self.reducer.bytes += sum(size * int(count[0]) for size, count in self._joined)

    def _note(self, program: Program) -> None:
        """The first fault of a program: two bits for each of the tensors that an operation is named after."""
        for (layer, tensors), status in zip(program.names, program.status.tolist(), strict=True):
            for place, tensor in enumerate(tensors):
                found = status >> (2 * place) & 3
                if found:
                    # Both bits: not finite, which comes first.
                    self.faults.note(1 if found == 3 else found, tensor, layer)
        program.clear()
