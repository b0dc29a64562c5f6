"""What the last stage has found, on its tensor rank 0: likeliest tokens, whole rows of logits where needed, faults."""

import numpy as np
from mpi4py import MPI

from llama_hpc.kernels.sampling import logit_of, token_of
from llama_hpc.model.faults import NONE
from llama_hpc.model.transformer import TransformerStage


class LogitsGather:
    """Collective over ``comm``, the tensor group of the last stage."""

    def __init__(self, comm: MPI.Comm, stage: TransformerStage):
        self.comm, self.stage = comm, stage
        self._fault = np.zeros(1, np.int64)
        rows, vocab_size = stage.logits.shape[0], stage.config.vocab_size
        self._ranges = comm.allgather(stage.share.vocabulary)
        first, several = comm.rank == 0, comm.size > 1
        self._own = np.empty(stage.logits.shape if several else (0, 0), np.float32)
        self._parts = np.empty(rows * vocab_size if first and several else 0, np.float32)
        self._whole = np.empty((rows, vocab_size) if first and several else (0, 0), np.float32)

    def fault(self) -> int:
        """The first fault of all ranks, or 0. Collective."""
        if self.comm.size == 1:
            return self.stage.faults.code
        self._fault[0] = self.stage.faults.code or NONE
        self.comm.Allreduce(MPI.IN_PLACE, self._fault, op=MPI.MIN)
        return int(self._fault[0]) % NONE

    def likeliest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For the step's first ``count`` outputs the tokens int64 with the largest logits, these, and the int64 sums of weights
        (see ``sampling.weigh``). On every rank, without communication."""
        best = self.stage.best[:count].max(axis=1, initial=-(2**63))
        return token_of(best), logit_of(best), self.stage.totals[:count].sum(axis=1)

    def rows(self, wanted: list[int]) -> np.ndarray:
        """Logits float32 [len(wanted), vocab_size] of outputs that were wanted, on tensor rank 0 (elsewhere without meaning).
        Collective."""
        own, count = self.stage.logits, len(wanted)
        if self.comm.size == 1 or not count:
            return own[wanted]
        np.take(own, wanted, axis=0, out=self._own[:count])
        counts = [count * len(held) for held in self._ranges]
        self.comm.Gatherv(self._own[:count], (self._parts, counts) if self.comm.rank == 0 else None)
        if self.comm.rank == 0:
            start = 0
            for held, size in zip(self._ranges, counts, strict=True):
                self._whole[:count, held.start : held.stop] = self._parts[start : start + size].reshape(count, len(held))
                start += size
        return self._whole[:count]

    def chosen(self, tokens: np.ndarray) -> np.ndarray:
        """The logits float32 [n] of ``tokens`` int64 [n], which were wanted of the step's first n outputs, on every rank.
        Collective."""
        logits = self.stage.picked(tokens)
        self.stage.reducer.sum_disjoint(logits)
        return logits
