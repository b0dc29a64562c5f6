"""What one step of a stage computes: programs of kernels, and the exact sums over the tensor group between them."""

import numpy as np

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.workers import Pool
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

    def exchange(self, function, array: np.ndarray, count: np.ndarray) -> None:
        """Ends the program here: ``function(array[:count])`` is called, then the next one runs; ``count`` is from ``counts``."""
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
                function(array[: count[0]])

    def _note(self, program: Program) -> None:
        """The first fault of a program: two bits for each of the tensors that an operation is named after."""
        for (layer, tensors), status in zip(program.names, program.status.tolist(), strict=True):
            for place, tensor in enumerate(tensors):
                found = status >> (2 * place) & 3
                if found:
                    # Both bits: not finite, which comes first.
                    self.faults.note(1 if found == 3 else found, tensor, layer)
        program.clear()
