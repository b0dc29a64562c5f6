"""The plan of every step: each request sees each of its positions once and in order, whatever runs beside it."""

import random

import numpy as np
import pytest

from llama_hpc.comm.outcomes import NONE, Outcome
from llama_hpc.engine.batching import MicroBatch
from llama_hpc.engine.replica import BatchPlan


def micro_batch(prompts, slots, prefill_chunk=256, max_rows=None, first_slot=0):
    return MicroBatch(first_slot, slots, lambda i: np.asarray(prompts[i], np.int32), prefill_chunk,
                      max_rows or max(prefill_chunk, slots))


def outcome(slots, token=(), done=(), admit=()):
    """An outcome from {slot: value} dictionaries and a collection of slots that are done."""
    result = Outcome(slots)
    result.clear()
    for slot, value in dict(token).items():
        result.token[slot] = value
    for slot, value in dict(admit).items():
        result.admit[slot] = value
    result.done[list(done)] = 1
    return result


def step(batch):
    """What a batch runs: [(sequence, position, token)] and the rows whose logits are wanted."""
    rows = slice(batch.rows)
    triples = zip(batch.sequences[rows].tolist(), batch.positions[rows].tolist(), batch.tokens[rows].tolist(), strict=True)
    return list(triples), batch.outputs.tolist()


def test_a_prompt_is_prefilled_in_chunks_then_decodes():
    mb = micro_batch([[10, 11, 12, 13, 14, 15, 16, 17, 18, 19]], 1, prefill_chunk=4)
    assert not mb.active
    mb.apply(outcome(1, admit={0: 0}))
    assert mb.active
    seen = []
    for expected_slots in ([], [], [0]):
        batch, slots = mb.plan()
        rows, outputs = step(batch)
        assert slots == expected_slots and outputs == [len(rows) - 1] * len(slots)
        seen.append(rows)
        mb.apply(outcome(1, token={0: 77} if slots else {}))
    assert [len(rows) for rows in seen] == [4, 4, 2]
    assert [row for rows in seen for row in rows] == [(0, i, 10 + i) for i in range(10)]
    batch, slots = mb.plan()
    assert (step(batch), slots) == (([(0, 10, 77)], [0]), [0])
    mb.apply(outcome(1, token={0: 78}, done=[0]))
    assert not mb.active


def test_a_free_slot_is_taken_in_the_same_step():
    mb = micro_batch([[1], [2], [30, 31]], 2)
    mb.apply(outcome(2, admit={0: 0, 1: 1}))
    assert mb.plan()[1] == [0, 1]
    mb.apply(outcome(2, token={0: 5, 1: 6}, done=[0], admit={0: 2}))
    batch, slots = mb.plan()
    assert step(batch) == ([(0, 0, 30), (0, 1, 31), (1, 1, 6)], [1, 2])
    assert slots == [0, 1] and mb.request == [2, 1]


def test_decoding_comes_before_prompts_in_the_budget_of_rows():
    """Three sequences decode; a long prompt beside them takes the rows that are left."""
    mb = micro_batch([[1], [2], [3], list(range(100, 120))], 4, prefill_chunk=8)
    mb.apply(outcome(4, admit={1: 0, 2: 1, 3: 2}))
    mb.plan()
    mb.apply(outcome(4, token={1: 7, 2: 8, 3: 9}, admit={0: 3}))
    batch, slots = mb.plan()
    rows, outputs = step(batch)
    assert rows == [*((0, i, 100 + i) for i in range(5)), (1, 1, 7), (2, 1, 8), (3, 1, 9)]
    assert slots == [1, 2, 3] and outputs == [5, 6, 7]


def test_a_prompt_without_rows_waits():
    mb = micro_batch([[1] * 8, [2] * 3], 2, prefill_chunk=8)
    mb.apply(outcome(2, admit={0: 0, 1: 1}))
    batch, slots = mb.plan()
    assert batch.rows == 8 and slots == [0]
    mb.apply(outcome(2, token={0: 4}))
    batch, slots = mb.plan()
    assert step(batch) == ([(0, 8, 4), (1, 0, 2), (1, 1, 2), (1, 2, 2)], [0, 3])
    assert slots == [0, 1]


def test_slots_are_numbered_from_the_first_of_the_micro_batch():
    mb = micro_batch([[1], [2]], 2, first_slot=6)
    mb.apply(outcome(2, admit={0: 0, 1: 1}))
    assert [sequence for sequence, _, _ in step(mb.plan()[0])[0]] == [6, 7]


class Leader:
    """Plays the leader for a micro-batch: admits requests in turn, samples numbers, ends answers at their length."""

    def __init__(self, prompts, answers, slots, prefill_chunk, max_rows):
        self.prompts, self.answers, self.slots, self.chunk, self.max_rows = prompts, answers, slots, prefill_chunk, max_rows
        self.mb = micro_batch(prompts, slots, prefill_chunk, max_rows)
        self.queue, self.held = list(range(len(prompts))), [NONE] * slots
        self.seen, self.sampled = [[] for _ in prompts], [[] for _ in prompts]

    def admissions(self):
        free = [slot for slot in range(self.slots) if self.held[slot] == NONE and self.queue]
        for slot in free[: len(self.queue)]:
            self.held[slot] = self.queue.pop(0)
        return {slot: self.held[slot] for slot in free}

    def run(self):
        self.mb.apply(outcome(self.slots, admit=self.admissions()))
        while self.mb.active:
            batch, slots = self.mb.plan()
            self.check(batch, slots)
            token = {slot: self.sample(self.held[slot]) for slot in slots}
            done = [slot for slot in slots if len(self.sampled[self.held[slot]]) == self.answers[self.held[slot]]]
            for slot in done:
                self.held[slot] = NONE
            self.mb.apply(outcome(self.slots, token, done, self.admissions()))

    def sample(self, request):
        self.sampled[request].append(1000 * request + len(self.sampled[request]))
        return self.sampled[request][-1]

    def check(self, batch, slots):
        """Rows within bounds and grouped by sequence; logits of exactly those whose known tokens have all run."""
        rows, outputs = step(batch)
        assert 1 <= len(rows) <= self.max_rows
        last = {}
        for row, (slot, position, token) in enumerate(rows):
            self.seen[self.held[slot]].append((position, token))
            last[slot] = row
        assert all(rows.count(row) == 1 for row in rows)
        for slot in set(last):
            count = sum(sequence == slot for sequence, _, _ in rows)
            assert count <= self.chunk and last[slot] - count + 1 == [s for s, _, _ in rows].index(slot)
        complete = [slot for slot in last if len(self.seen[self.held[slot]])
                    == len(self.prompts[self.held[slot]]) + len(self.sampled[self.held[slot]])]
        assert slots == complete and outputs == [last[slot] for slot in complete]
        # A slot that decodes never waits.
        assert {slot for slot, request in enumerate(self.held) if request != NONE and self.sampled[request]} <= set(slots)


@pytest.mark.parametrize("seed", range(60))
def test_every_request_sees_each_of_its_positions_once_and_in_order(seed):
    draw = random.Random(seed)
    count, slots, chunk = draw.randint(1, 20), draw.randint(1, 6), draw.randint(1, 9)
    prompts = [[draw.randint(0, 99) for _ in range(draw.randint(1, 30))] for _ in range(count)]
    answers = [draw.randint(1, 12) for _ in range(count)]
    leader = Leader(prompts, answers, slots, chunk, draw.randint(max(chunk, slots), 20))
    leader.run()
    assert not leader.queue and set(leader.held) == {NONE}
    for prompt, answer, seen, sampled in zip(prompts, answers, leader.seen, leader.sampled, strict=True):
        assert len(sampled) == answer
        # The last token of an answer is never run: nothing follows it.
        assert seen == list(enumerate(prompt + sampled[:-1]))


@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_slots_hold_what_max_seqs_allows(data, stages):
    for requests in (1, 2, 3, 7, 16, 100):
        for max_seqs in (1, 2, 4, 16):
            plan = BatchPlan.of(data, stages, requests, max_seqs, 8)
            assert 1 <= plan.sequences <= max_seqs
            assert plan.micro_batches <= stages and plan.slots <= plan.max_rows and plan.max_rows >= 8
            if requests <= data:
                assert plan.sequences == 1


def test_every_stage_has_a_micro_batch_to_work_on():
    assert BatchPlan.of(1, 4, 100, 16, 256) == BatchPlan(4, 4, 256, 256)
    assert BatchPlan.of(1, 4, 100, 16, 256, micro_batches=2) == BatchPlan(2, 8, 256, 256)
    assert BatchPlan.of(1, 1, 1000, 512, 256) == BatchPlan(1, 512, 256, 512)
    # Three requests for two replicas: each answers at most two at a time.
    assert BatchPlan.of(2, 1, 3, 16, 256).sequences == 2
