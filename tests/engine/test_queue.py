"""Who answers what: every request once, long ones first, fairly dealt."""

from itertools import chain

import numpy as np
import pytest

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.queue import RequestQueue, by_cost, in_order
from llama_hpc.engine.sampling_params import SamplingParams


class Counters:
    """The shared counter, for replicas in one process."""

    def __init__(self):
        self.value = 0

    def add(self, counter, value):
        self.value += value
        return self.value - value


def requests(lengths, limits, arrivals=None, samples=1):
    arrivals, params = arrivals or [None] * len(lengths), SamplingParams(temperature=1, n=samples)
    return [ReadyRequest(i, str(i), np.zeros(n, np.int32), params, limit, arrival)
            for i, (n, limit, arrival) in enumerate(zip(lengths, limits, arrivals, strict=True))]


def test_long_ones_come_first_and_equals_in_their_order():
    assert by_cost(requests([5, 5, 100, 5], [10, 400, 10, 10])) == [1, 2, 0, 3]
    # The prompt is computed once for all samples.
    assert by_cost(requests([100, 0], [10, 30])) == [0, 1] and by_cost(requests([100, 0], [10, 30], samples=2)) == [1, 0]


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("count", "replicas", "at_once"), [(1, 3, 4), (7, 2, 2), (20, 3, 4), (5, 1, 64)])
def test_every_request_is_taken_once(count, replicas, at_once, timed):
    counters, arrivals = Counters(), [0.5 * i for i in range(count)] if timed else None
    queues = [RequestQueue(list(range(count))[::-1], arrivals, counters, r, replicas, at_once) for r in range(replicas)]
    taken = [[] for _ in queues]
    while not all(queue.exhausted for queue in queues):
        for queue, own in zip(queues, taken, strict=True):
            if (number := queue.take(100.0)) is not None:
                own.append(number)
    assert sorted(chain(*taken)) == list(range(count))
    assert all(queue.take(100.0) is None and queue.next_arrival is None for queue in queues)


def test_the_first_ones_are_dealt_however_early_a_replica_asks():
    """Ten requests for two replicas of four places."""
    counters = Counters()
    first, second = (RequestQueue(list(range(10)), None, counters, replica, 2, 4) for replica in range(2))
    assert [first.take(0) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert [second.take(0) for _ in range(5)] == [1, 3, 5, 7, 9]


def test_requests_come_when_they_arrive():
    """In the order of the file, whatever they cost; one that was drawn ahead is kept, and the other replica gets the next."""
    counters, timed = Counters(), requests([1, 50, 3], [1, 1, 1], [0.0, 2.0, 3.0])
    first, second = (RequestQueue(*in_order(timed), counters, replica, 2, 8) for replica in range(2))
    assert first.take(0.0) == 0 and first.take(1.0) is None and first.next_arrival == 2.0
    assert second.take(1.9) is None and second.next_arrival == 3.0
    assert not first.exhausted and first.take(2.0) == 1 and second.take(2.5) is None and second.take(3.0) == 2
    assert first.take(9.0) is None and first.exhausted
