"""The plan of every step, derived alike by all ranks of a replica: which tokens of which sequences run next."""

import numpy as np

from llama_hpc.comm.outcomes import NONE, Outcome
from llama_hpc.model.transformer import Batch


class MicroBatch:
    """Sequences that run together, each in a slot of the KV cache.

    A slot is prefilled in chunks, then decodes one token a step; when its sequence ends, the next request takes the
    slot at once. ``prompts`` maps a request number to its int32 token ids. Slots are numbered from ``first_slot`` in the cache.
    """

    def __init__(self, first_slot: int, slots: int, prompts, prefill_chunk: int, max_rows: int):
        self.slots, self.prompts, self.prefill_chunk, self.max_rows = slots, prompts, prefill_chunk, max_rows
        self.request = [NONE] * slots
        self._first_slot = first_slot
        self._cached = [0] * slots          # positions in the KV cache
        self._last = [NONE] * slots         # the token sampled last, not yet in the cache
        self._tokens, self._sequences, self._positions = (np.zeros(max_rows, np.int32) for _ in range(3))
        self._outputs = np.zeros(slots, np.intp)

    @property
    def active(self) -> bool:
        return any(request != NONE for request in self.request)

    def apply(self, outcome: Outcome) -> None:
        """Takes over the leader's decisions about the step before."""
        for slot in range(self.slots):
            if outcome.token[slot] != NONE:
                self._last[slot] = int(outcome.token[slot])
            if outcome.done[slot]:
                self.request[slot] = NONE
            if outcome.admit[slot] != NONE:
                self.request[slot], self._cached[slot], self._last[slot] = int(outcome.admit[slot]), 0, NONE

    def plan(self) -> tuple[Batch, list[int]]:
        """The next step, and the slots whose logits it yields, in the order of ``Batch.outputs``.

        Decoding sequences come first in the budget of rows; prompts take what is left, a chunk each.
        """
        decoding = sum(self._last[s] != NONE for s in range(self.slots) if self.request[s] != NONE)
        left = self.max_rows - decoding
        row, slots = 0, []
        for slot, request in enumerate(self.request):
            if request == NONE:
                continue
            cached = self._cached[slot]
            if self._last[slot] != NONE:
                tokens, count, complete = self._last[slot], 1, True
            else:
                prompt = self.prompts(request)
                count = min(len(prompt) - cached, self.prefill_chunk, left)
                if count == 0:
                    continue
                left -= count
                tokens, complete = prompt[cached : cached + count], cached + count == len(prompt)
            rows = slice(row, row + count)
            self._tokens[rows] = tokens
            self._sequences[rows] = self._first_slot + slot
            self._positions[rows] = np.arange(cached, cached + count)
            self._cached[slot] += count
            row += count
            if complete:
                self._outputs[len(slots)] = row - 1
                slots.append(slot)
        return Batch(row, self._tokens, self._sequences, self._positions, self._outputs[: len(slots)]), slots
