"""One sequence, step by step: its KV cache on every rank, and the logits of what is appended to it."""

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.engine.llm import Transformer
from llama_hpc.engine.logits import LogitsGather
from llama_hpc.engine.pipeline import PipelineStage
from llama_hpc.engine.requests import check_token_list, check_vocabulary
from llama_hpc.engine.session import token_list
from llama_hpc.errors import UsageError
from llama_hpc.model.faults import error_of
from llama_hpc.model.rope import check_positions
from llama_hpc.model.transformer import Batch
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.runtime.activity import beat, doing

_CHUNK = 128                    # tokens of a step: so many rows of logits are kept


class InferenceState:
    """The state of one sequence of up to ``max_seq_len`` tokens in a loaded model, of which ``length`` are in the KV cache.

    Every replica holds one, and computes the same. Making one, ``forward`` and ``close`` are collective over all ranks of the
    model; what the first rank gives counts. Any number may exist at a time. ``Transformer.state`` and ``LLM.state`` make them.
    """

    @doing("making a state")
    def __init__(self, model: Transformer, max_seq_len: int | None = None):
        session = model.session
        config, grid = session.checkpoint.config, session.grid
        self.max_seq_len, self.length = max_seq_len or session.usual_length, 0
        with agreed(session.comm, "making a state"):
            if not 1 <= self.max_seq_len <= config.context_length:
                raise UsageError(f"max_seq_len is {self.max_seq_len}: it must be 1 to the context of {config.context_length}")
            check_positions(config, self.max_seq_len)
        rows = min(_CHUNK, self.max_seq_len)
        self._session, self._rows, self._fault = session, rows, np.zeros(1, np.int64)
        self._stage = session.make_stage(session.held, sequences=1, max_seq_len=self.max_seq_len, max_rows=rows, max_outputs=rows)
        self._channel = StageChannel(grid.pipeline_comm, 1, rows, config.hidden_size)
        self._gather = LogitsGather(grid.tensor_comm, self._stage) if grid.last_stage else None

    @doing("forward")
    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the logits float32 [n, vocab_size] after each of them, on every rank. Collective.

        Raises UsageError for what are no token ids, or too many, and NumericsError.
        """
        ids = on_first(self._session.comm, self._checked, token_ids)
        logits = np.empty((len(ids), self._session.checkpoint.config.vocab_size), np.float32)
        for first in range(0, len(ids), self._rows):
            part = ids[first : first + self._rows]
            self._step(part, logits[first : first + len(part)])
            beat()
        return logits

    def rewind(self, length: int = 0) -> None:
        """Forgets all tokens but the first ``length``: what is appended next takes their places. Every rank is to do the same."""
        if not 0 <= length <= self.length:
            raise UsageError(f"the state has {self.length} tokens: it cannot be rewound to {length}")
        self.length = length

    @doing("close")
    def close(self) -> None:
        """Gives the cache back; the state cannot be used afterwards. Collective."""
        if self._stage is not None:
            self._channel.finish()
            self._stage.free()
            self._stage = None

    def _checked(self, token_ids: Sequence[int]) -> np.ndarray:
        if self._stage is None:
            raise UsageError("this state is closed: make another one")
        ids = token_list(token_ids)
        check_token_list(ids)
        check_vocabulary("forward", ids, self._session.checkpoint.config.vocab_size)
        if self.length + len(ids) > self.max_seq_len:
            raise UsageError(f"the state has {self.length} of {self.max_seq_len} tokens, {len(ids)} more do not fit: make one "
                             "with a larger max_seq_len")
        return np.array(ids, np.int32)

    def _step(self, ids: np.ndarray, logits: np.ndarray) -> None:
        """One step of all stages; ``logits`` takes its rows."""
        grid, count = self._session.grid, len(ids)
        positions = np.arange(self.length, self.length + count, dtype=np.int32)
        batch = Batch(count, ids, np.zeros(count, np.int32), positions, np.arange(count))
        PipelineStage(self._stage, self._channel).run(batch)
        if self._gather is not None:
            self._fault[0] = self._gather.fault()
            rows = self._gather.rows(list(range(count)))
            if grid.is_leader:
                logits[:] = rows
        self._stage.faults.clear()
        grid.replica.Bcast(self._fault, grid.leader_rank)
        if self._fault[0]:
            error = error_of(int(self._fault[0]))
            # Every replica has computed the same, so all ranks raise it.
            error.collective = self._session.comm.size == MPI.COMM_WORLD.size
            raise error
        grid.replica.Bcast(logits, grid.leader_rank)
        self.length += count
