"""The plan of every step: each sequence sees each of its positions once and in order, in a cache that holds what it reads."""

import random
from collections import deque
from dataclasses import astuple, replace

import numpy as np
import pytest

from llama_hpc.comm.outcomes import Outcome
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.scheduler import Scheduler, Sequence, StepLimits
from llama_hpc.kernels.numerics import ATTENTION_BLOCK, PAGE
from llama_hpc.model.kv_cache import pages_in_a_part, pages_of


class World:
    """Plays the leader and the model: admits requests in turn, samples numbers, ends answers at their length, and keeps what the
    cache holds, page by page. Checks every step.

    ``room(step)``: how many pages may be in use from a step on, of which the memory of all others is given back.

    Each request has as many ``samples`` with answers of one length; everything else is by answer, those of a request in a row.
    """

    def __init__(self, prompts, answers, *, samples=1, max_seqs=4, budget=64, prefill=None, decode=0, depth=1, pages=None,
                 sharing=True, parts=1, room=None):
        self.samples, self.max_seqs = samples, max_seqs
        self.prompts, self.answers = ([item for item in items for _ in range(samples)] for items in (prompts, answers))
        longest = max(len(p) + n for p, n in zip(prompts, answers, strict=True))
        self.parts, self.first_parts = parts, np.full(max_seqs, -1, np.int32)
        self.pool = PagePool(pages or max_seqs * parts * pages_in_a_part(longest, parts), sharing, parts)
        self.table = np.full((max_seqs, pages_of(longest)), -1, np.int32)
        self.limits, self.room = StepLimits(budget, prefill or budget, decode), room or (lambda step: 0)
        self.scheduler = Scheduler(self.limits, max_seqs, self.pool, self.table, depth, self.sequences,
                                   self.first_parts)
        self.queue, self.live = deque(range(len(prompts))), set()
        self.texts = [list(p) for p in self.prompts]    # tokens known so far
        self.cache = {}                                 # (part, page of it, place): the name of all tokens up to there
        self.names, self.known_names = {}, [[] for _ in self.prompts]
        self.ran = [0] * len(self.prompts)              # rows run for each answer
        self.steps = []

    def sequences(self, request):
        first = request * self.samples
        return [Sequence(request, sample, np.array(self.prompts[first], np.int32), self.answers[first])
                for sample in range(self.samples)]

    def answer(self, sequence):
        return sequence.request * self.samples + sequence.sample

    def admit(self):
        admitted = []
        while self.queue and len(self.live) < self.max_seqs:
            admitted.append(self.queue.popleft())
            self.live.update(map(self.answer, self.sequences(admitted[-1])))
        return admitted

    def outcome(self, chosen=()):
        outcome = Outcome(self.max_seqs)
        for i, sequence in enumerate(chosen):
            answer = self.answer(sequence)
            text = self.texts[answer]
            text.append(1000 * answer + len(text))
            outcome.token[i] = text[-1]
            outcome.done[i] = len(text) == len(self.prompts[answer]) + self.answers[answer]
            if outcome.done[i]:
                self.live.remove(answer)
        limits = replace(self.limits, pages=self.room(len(self.steps)))
        outcome.decide(0, False, astuple(limits), self.admit())
        return outcome

    def apply(self, outcome):
        """As a rank does it."""
        before = self.scheduler.limits.pages or self.pool.count
        self.scheduler.apply(outcome)
        if 0 < self.scheduler.limits.pages < before:
            gone = {(part, page) for part in range(self.parts) for page in self.pool.forget(part)}
            self.cache = {place: name for place, name in self.cache.items() if place[:2] not in gone}
            assert self.pool.touched <= self.scheduler.limits.pages or len(self.scheduler.running) == 1

    def run(self, limit=5000):
        self.apply(self.outcome())
        under_way = deque()
        while self.live or self.queue or under_way:
            if len(under_way) == self.scheduler.depth:
                self.apply(under_way.popleft())
            under_way.append(self.step())
            assert len(self.steps) < limit, "it does not end"
            if not self.live and not self.queue and not any(self.steps[-self.scheduler.depth :]):
                break
        return self

    def name(self, answer, position):
        """A number for the beginning of an answer's text up to a position: the same for equal ones."""
        known, text = self.known_names[answer], self.texts[answer]
        while len(known) <= position:
            known.append(self.names.setdefault((known[-1] if known else -1, text[len(known)]), len(self.names)))
        return known[position]

    def place(self, sequence, position):
        """Where a rank looks for a position: part, page of this part, place in the page."""
        part = (self.first_parts[sequence.slot] + position // ATTENTION_BLOCK) % self.parts
        return part, self.table[sequence.slot, position // PAGE], position % PAGE

    def step(self):
        batch, chosen = self.scheduler.plan()
        assert batch.rows <= self.limits.token_budget and self.pool.used <= self.pool.count
        by_slot = {s.slot: s for s in self.scheduler.running}
        rows = [(by_slot[batch.sequences[r]], int(batch.positions[r]), int(batch.tokens[r])) for r in range(batch.rows)]
        for sequence, position, token in rows:
            text, place = self.texts[self.answer(sequence)], self.place(sequence, position)
            page, part = sequence.pages[position // PAGE], place[0]
            assert page == place[1] * self.parts + part and token == text[position]
            self.cache[place] = self.name(self.answer(sequence), position)
            self.ran[self.answer(sequence)] += 1
        # Attention reads behind all writes of the step: every position up to its own must be there.
        for sequence, position in {id(s): (s, p) for s, p, _ in rows}.values():
            for p in range(position + 1):
                assert self.cache[self.place(sequence, p)] == self.name(self.answer(sequence), p)
        last = {id(s): (s, p, r) for r, (s, p, _) in enumerate(rows)}
        complete = [(s, r) for s, p, r in last.values() if p + 1 == len(self.texts[self.answer(s)])]
        assert [(s, int(r)) for s, r in zip(chosen, batch.outputs, strict=True)] == complete
        self.steps.append([(self.answer(s), p) for s, p, _ in rows])
        return self.outcome(chosen)


def test_a_prompt_is_prefilled_in_chunks_then_decodes():
    world = World([[10, 11, 12, 13, 14, 15, 16, 17, 18, 19]], [3], prefill=4).run()
    assert [[p for _, p in step] for step in world.steps if step] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10], [11]]


def test_decoding_comes_before_prompts_in_the_budget():
    world = World([[1], [2], [3], list(range(100, 120))], [9, 9, 9, 1], max_seqs=4, budget=8).run()
    assert world.steps[0] == [(0, 0), (1, 0), (2, 0), *((3, p) for p in range(5))]
    assert world.steps[1] == [(0, 1), (1, 1), (2, 1), *((3, p) for p in range(5, 10))]


def test_a_free_place_is_taken_in_the_next_step():
    world = World([[1], [2], [30, 31]], [1, 5, 2], max_seqs=2).run()
    assert world.steps[:2] == [[(0, 0), (1, 0)], [(1, 1), (2, 0), (2, 1)]]


def test_chunks_of_a_long_prompt_follow_each_other_while_a_decoding_sequence_waits():
    world = World([list(range(40))], [4], prefill=8, depth=3).run()
    steps = [[p for _, p in step] for step in world.steps]
    assert [len(step) for step in steps[:5]] == [8] * 5
    # The token of step 4 is known three steps later, and so on.
    assert steps[5:14] == [[], [], [40], [], [], [41], [], [], [42]]


def test_decoding_sequences_spread_over_the_steps_under_way():
    world = World([[n] for n in range(12)], [20] * 12, max_seqs=12, prefill=3, depth=4).run()
    assert all(len(step) == 3 for step in world.steps[8:40])


def test_equal_beginnings_run_once_even_in_one_step():
    common = list(range(100, 100 + 3 * PAGE))
    world = World([[*common, n] for n in range(5)], [3] * 5, max_seqs=5, budget=200).run()
    assert world.ran == [3 * PAGE + 3, 3, 3, 3, 3]
    assert world.pool.shared_tokens == 4 * 3 * PAGE
    alone = World([[*common, n] for n in range(5)], [3] * 5, max_seqs=5, budget=300, sharing=False).run()
    assert alone.ran == [3 * PAGE + 3] * 5


def test_samples_share_their_prompt_and_wait_for_places():
    """More samples than places: all of a request are handed over at once, and no more of them run than there are places."""
    world = World([list(range(2 * PAGE + 5)), [7]], [4, 3], samples=7, max_seqs=3, budget=200).run()
    # Rows that run anew for a sample: the part of the prompt that does not fill a page, and its answer but for the last token.
    assert world.ran == [2 * PAGE + 5 + 3, *[5 + 3] * 6, *[3] * 7]
    assert max(len({answer for answer, _ in step}) for step in world.steps) == 3


def test_the_youngest_gives_way_and_starts_over():
    world = World([[1] * 16, [2] * 16, [3] * 16], [40, 40, 40], max_seqs=3, pages=8, sharing=False).run()
    assert world.scheduler.setbacks > 0
    # The oldest never runs anything twice.
    assert world.ran[0] == 16 + 39 and world.ran[2] > 16 + 39


def test_a_set_back_sequence_finds_what_is_left_of_its_pages():
    prompts = [[n] * 40 for n in (1, 2)]
    shared, alone = (World(prompts, [60, 60], max_seqs=2, pages=10, sharing=sharing).run() for sharing in (True, False))
    assert shared.scheduler.setbacks and alone.scheduler.setbacks
    assert shared.ran[1] < alone.ran[1]


@pytest.mark.parametrize("seed", range(150))
def test_whatever_the_limits_every_answer_is_complete(seed):
    """Prompts with common beginnings, any budget, depth and cache that holds one sequence."""
    draw = random.Random(seed)
    beginning = [draw.randint(0, 9) for _ in range(50)]
    count = draw.randint(1, 14)
    prompts = [beginning[: draw.choice((0, 16, 31, 48))] + [draw.randint(0, 99) for _ in range(draw.randint(1, 30))]
               for _ in range(count)]
    answers = [draw.randint(1, 40) for _ in range(count)]
    least = max(pages_of(len(p) + n) for p, n in zip(prompts, answers, strict=True))
    max_seqs, budget, samples = draw.randint(1, 6), draw.randint(1, 40), draw.choice((1, 1, 2, 9))
    world = World(prompts, answers, samples=samples, max_seqs=max_seqs, budget=budget, prefill=draw.randint(1, budget),
                  depth=draw.randint(1, 5), decode=draw.choice((0, 0, 1, 2)),
                  pages=least + draw.choice((0, 1, 3, 20)), sharing=draw.random() < 0.7).run(5000 * samples)
    assert [len(t) for t in world.texts] == [len(p) + n for p, n in zip(world.prompts, world.answers, strict=True)]
    assert world.scheduler.idle and world.pool.used == 0 and world.pool.most_used <= world.pool.count


@pytest.mark.parametrize("seed", range(40))
def test_with_a_cache_in_parts_every_answer_is_complete(seed):
    """Prompts of several blocks with common beginnings, in a cache whose parts just hold the longest one."""
    draw = random.Random(seed)
    parts, count = draw.randint(2, 4), draw.randint(1, 7)
    beginning = [draw.randint(0, 9) for _ in range(700)]
    prompts = [beginning[: draw.choice((0, 16, 300, 600))] + [draw.randint(0, 99) for _ in range(draw.randint(1, 400))]
               for _ in range(count)]
    answers = [draw.randint(1, 30) for _ in range(count)]
    least = max(pages_in_a_part(len(p) + n, parts) for p, n in zip(prompts, answers, strict=True))
    world = World(prompts, answers, max_seqs=draw.randint(1, 4), budget=draw.choice((50, 256, 1000)), depth=draw.randint(1, 3),
                  parts=parts, pages=parts * (least + draw.choice((0, 1, 5, 40))), sharing=draw.random() < 0.7).run()
    assert [len(t) for t in world.texts] == [len(p) + n for p, n in zip(world.prompts, world.answers, strict=True)]
    assert world.scheduler.idle and world.pool.used == 0


def test_with_less_room_the_youngest_give_way_and_with_more_they_come_back():
    world = World([[n] * 16 for n in range(4)], [100] * 4, max_seqs=4, pages=32, sharing=False,
                  room=lambda step: 6 if 20 <= step < 30 else 32).run()
    running = [len({answer for answer, _ in step}) for step in world.steps]
    assert running[19] == 4 and running[22:29] == [2] * 7 and running[40] == 4
    assert world.scheduler.setbacks == 2 and world.ran[:2] == [16 + 99] * 2


@pytest.mark.parametrize("seed", range(60))
def test_however_the_room_changes_every_answer_is_complete(seed):
    """Pages are withdrawn and come back at any time, with the memory of those without content given back."""
    draw = random.Random(seed)
    parts, count = draw.choice((1, 1, 2, 3)), draw.randint(2, 10)
    beginning = [draw.randint(0, 9) for _ in range(600)]
    prompts = [beginning[: draw.choice((0, 16, 48, 500))] + [draw.randint(0, 99) for _ in range(draw.randint(1, 200))]
               for _ in range(count)]
    answers = [draw.randint(1, 40) for _ in range(count)]
    least = parts * max(pages_in_a_part(len(p) + n, parts) for p, n in zip(prompts, answers, strict=True))
    most = least + parts * draw.choice((1, 5, 40))
    rooms = [draw.randint(least // parts, most // parts) * parts for _ in range(200)]
    world = World(prompts, answers, max_seqs=draw.randint(2, 6), budget=draw.choice((16, 100, 1000)), depth=draw.randint(1, 4),
                  parts=parts, pages=most, sharing=draw.random() < 0.7, room=lambda step: rooms[step // 7 % 200]).run()
    assert [len(t) for t in world.texts] == [len(p) + n for p, n in zip(world.prompts, world.answers, strict=True)]
    assert world.scheduler.idle and world.pool.used == 0


def test_short_sequences_begin_in_the_part_with_most_room():
    """Four of a block each fill four parts of a block each: none waits."""
    world = World([[n] * 200 for n in range(4)], [50] * 4, max_seqs=4, budget=1000, parts=4, pages=4 * 16).run()
    assert sorted(world.first_parts) == [0, 1, 2, 3] and world.scheduler.setbacks == 0
    assert len(world.steps[0]) == 800
