"""What runs in the next step, derived alike by all ranks of a replica from what the leader told them.

Sequences join and leave the batch at every step (continuous batching; Orca, Yu et al. 2022). Several steps may be under way at
once: a sequence takes part in the next one as soon as its tokens are known, so the chunks of a long prompt follow each other
through the stages, and a decoding sequence waits for its last token.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from llama_hpc.comm.outcomes import Outcome
from llama_hpc.engine.pages import ROOT, PagePool
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import pages_by_part, pages_of
from llama_hpc.model.transformer import Batch


@dataclass(frozen=True)
class StepLimits:
    """What a step may hold. The leader may change it from step to step, never beyond what the first steps may hold.

    ``token_budget``: rows in all; ``prefill``: rows of prompts; ``decode``: sequences with one row each, 0 for an equal share for
    each of the steps under way; ``pages``: of the cache in use, 0 for all.
    """

    token_budget: int
    prefill: int
    decode: int = 0
    pages: int = 0


class Sequence:
    """One answer to one request on its way: its tokens, and where they lie in the cache."""

    def __init__(self, request: int, sample: int, prompt: np.ndarray, limit: int):
        self.request, self.sample = request, sample
        self.tokens = np.zeros(len(prompt) + limit, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.known = len(prompt)        # tokens known so far
        self.cached = 0                 # of which the cache has, or the steps under way will have put there
        self.waits = False              # for a token of a step under way
        self.slot = -1                  # row of the page table; -1 while it does not run
        self.pages: list[int] = []
        self.first_part = 0             # of the cache, where its first block lies
        self.last_step = -1
        self.setbacks = 0
        self._name, self._stored = ROOT, 0

    @property
    def missing(self) -> int:
        """Tokens to run before the next one is known."""
        return 0 if self.waits else self.known - self.cached

    def start(self, slot: int, pool: PagePool) -> None:
        """Takes a slot, and what the cache has of its tokens already."""
        known = self.tokens[: self.known]
        self.slot, self.first_part = slot, pool.first_part(known)
        self.pages, self._name = pool.find(known)
        self._stored = len(self.pages)
        self.cached = self._stored * PAGE

    def stop(self, pool: PagePool) -> None:
        """Lets go of slot and pages: the answer has ended, or starts over later."""
        pool.release(self.pages)
        self.slot, self.pages, self.cached = -1, [], 0

    def needs(self, parts: int, first_part: int) -> list[int]:
        """Pages of each part of the cache that it has to take for its known tokens and the next one."""
        return pages_by_part(len(self.pages), pages_of(self.known + 1), parts, first_part)

    def advance(self, count: int, pool: PagePool) -> None:
        """The next ``count`` tokens run: pages that become full can be shared from now on."""
        self.cached += count
        self.waits = self.cached == self.known
        while (self._stored + 1) * PAGE <= self.cached:
            first = self._stored * PAGE
            self._name = pool.store(self.pages[self._stored], self._name, self.tokens[first : first + PAGE])
            self._stored += 1

    def learn(self, token: int) -> None:
        """The token that it waited for."""
        self.tokens[self.known] = token
        self.known += 1
        self.waits = False


class Scheduler:
    """Plans steps for up to ``max_seqs`` sequences whose pages come from ``pool``, ``depth`` of them under way at once.

    ``table`` int32 [max_seqs, pages of a sequence] is the cache's page table, ``first_parts`` int32 [max_seqs] the part of each
    sequence's first block (both: see ``KVCache``).

    ``sequences(request)`` makes the sequences of an admitted request. Every rank of a replica calls ``plan`` and ``apply`` in the
    same order with the same outcomes, and so has the same plans.
    """

    def __init__(self, limits: StepLimits, max_seqs: int, pool: PagePool, table: np.ndarray, depth: int, sequences,
                 first_parts: np.ndarray | None = None):
        self.limits, self.pool, self.table, self.depth, self._sequences = limits, pool, table, depth, sequences
        self._first_parts = np.zeros(max_seqs, np.int32) if first_parts is None else first_parts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []       # in the order of their admission
        self.setbacks = 0
        self._slots = list(range(max_seqs - 1, -1, -1))
        self._under_way: deque[list[Sequence]] = deque()
        self._step = 0
        self.prefilled = 0                      # rows of prompts in the last step
        rows = limits.token_budget
        self._tokens, self._slot_of_row, self._positions = (np.zeros(rows, np.int32) for _ in range(3))
        self._outputs = np.zeros(max_seqs, np.int64)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def apply(self, outcome: Outcome) -> None:
        """Takes over the leader's decisions about the oldest step under way (none before the first one)."""
        if self._under_way:
            for i, sequence in enumerate(self._under_way.popleft()):
                sequence.learn(int(outcome.token[i]))
                if outcome.done[i]:
                    self._end(sequence)
        before, self.limits = self.limits, StepLimits(*outcome.limits)
        if self.limits.pages != before.pages:
            self._fit(self.limits.pages or self.pool.count)
        for request in outcome.admitted:
            self.waiting.extend(self._sequences(int(request)))

    def _fit(self, pages: int) -> None:
        """Uses no more than so many pages: the youngest sequences are set back for it, all but the oldest if need be."""
        while not self.pool.withhold(pages) and len(self.running) > 1:
            self._set_back(self.running[-1])

    def _end(self, sequence: Sequence) -> None:
        if sequence.slot < 0:
            # It was set back while its last step was under way.
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.stop(self.pool)

    def plan(self) -> tuple[Batch, list[Sequence]]:
        """The next step, perhaps an empty one, and the sequences whose next token it yields, in the order of its outputs."""
        self._row, self.prefilled, chosen = 0, 0, []
        self._decode(chosen)
        self._prefill(chosen)
        self._admit(chosen)
        self._under_way.append(chosen)
        self._step += 1
        outputs = self._outputs[: len(chosen)]
        return Batch(self._row, self._tokens, self._slot_of_row, self._positions, outputs), chosen

    def _decode(self, chosen: list[Sequence]) -> None:
        """Sequences that need one token, those that waited longest first."""
        limit = self.limits.decode or -(-len(self.running) // self.depth)
        ready = sorted((s for s in self.running if s.missing == 1), key=lambda s: s.last_step)
        for sequence in ready[: min(limit, self.limits.token_budget)]:
            # Another one may just have had to give way for its pages.
            if sequence.slot >= 0 and self._make_room(sequence, 1):
                self._add(sequence, 1, chosen)

    def _prefill(self, chosen: list[Sequence]) -> None:
        """Prompts that have begun, the oldest first: a chunk each of what is left of the step."""
        for sequence in list(self.running):
            left = self._left()
            if left <= 0:
                return
            if sequence.slot >= 0 and sequence.missing > 1:
                self._chunk(sequence, left, chosen)

    def _admit(self, chosen: list[Sequence]) -> None:
        """New sequences, in turn, while there is a slot, and room for known tokens and the next one of each that then runs."""
        while self.waiting and self._slots and (left := self._left()) > 0:
            sequence = self.waiting[0]
            if sequence.waits or (self.running and not self._has_room_beside(sequence)):
                return
            self.waiting.popleft()
            sequence.start(self._slots.pop(), self.pool)
            self._first_parts[sequence.slot] = sequence.first_part
            self.table[sequence.slot, : len(sequence.pages)] = [page // self.pool.parts for page in sequence.pages]
            self.running.append(sequence)
            self._chunk(sequence, left, chosen)

    def _has_room_beside(self, sequence: Sequence) -> bool:
        """Whether every part of the cache has what running sequences and this one, which is about to start, need."""
        parts = self.pool.parts
        first = self.pool.first_part(sequence.tokens[: sequence.known])
        needs = [sequence.needs(parts, first), *(s.needs(parts, s.first_part) for s in self.running)]
        return all(sum(of_part) <= room for *of_part, room in zip(*needs, self.pool.room(), strict=True))

    def _chunk(self, sequence: Sequence, left: int, chosen: list[Sequence]) -> None:
        """Up to ``left`` tokens of a prompt, if there is room for them."""
        count = min(sequence.missing, left)
        if self._make_room(sequence, count):
            self.prefilled += count
            self._add(sequence, count, chosen)

    def _left(self) -> int:
        """Rows that prompts may still take of this step."""
        return min(self.limits.token_budget - self._row, self.limits.prefill - self.prefilled)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for the next ``count`` tokens. The youngest sequences that are not part of this step are set back for it, itself
        if there is none younger; False where it cannot take part."""
        while len(sequence.pages) * PAGE < sequence.cached + count:
            page = self.pool.take(self.pool.part_of(sequence.first_part, len(sequence.pages)))
            if page is not None:
                self.table[sequence.slot, len(sequence.pages)] = page // self.pool.parts
                sequence.pages.append(page)
                continue
            victim = next(s for s in reversed(self.running) if s.last_step != self._step)
            if victim is sequence and victim is not self.running[-1]:
                # Younger ones have taken the room in this step: in the next one it comes first.
                return False
            self._set_back(victim)
            if victim is sequence:
                return False
        return True

    def _set_back(self, sequence: Sequence) -> None:
        """It starts over when there is room again. Steps under way may still write to its pages: they do so before whatever gets
        these pages in a later step."""
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.stop(self.pool)
        sequence.setbacks += 1
        self.setbacks += 1
        self.waiting.appendleft(sequence)

    def _add(self, sequence: Sequence, count: int, chosen: list[Sequence]) -> None:
        """The next ``count`` tokens of a sequence become rows of the step."""
        first, rows = sequence.cached, slice(self._row, self._row + count)
        self._tokens[rows] = sequence.tokens[first : first + count]
        self._slot_of_row[rows] = sequence.slot
        self._positions[rows] = np.arange(first, first + count)
        self._row += count
        sequence.last_step = self._step
        sequence.advance(count, self.pool)
        if sequence.waits:
            self._outputs[len(chosen)] = self._row - 1
            chosen.append(sequence)
