"""Who answers what: every request once, long ones first, fairly dealt."""

from itertools import chain

import numpy as np
import pytest

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.queue import RequestQueue, by_cost
from llama_hpc.engine.sampling_params import SamplingParams


class Counters:
    """The shared counter, for replicas in one process."""

    def __init__(self):
        self.value = 0

    def add(self, counter, value):
        self.value += value
        return self.value - value


def requests(lengths, limits, samples=1):
    return [ReadyRequest(i, str(i), np.zeros(n, np.int32), SamplingParams(temperature=1, n=samples), limit)
            for i, (n, limit) in enumerate(zip(lengths, limits, strict=True))]


def test_long_ones_come_first_and_equals_in_their_order():
    assert by_cost(requests([5, 5, 100, 5], [10, 400, 10, 10])) == [1, 2, 0, 3]
    # The prompt is computed once for all samples.
    assert by_cost(requests([100, 0], [10, 30])) == [0, 1] and by_cost(requests([100, 0], [10, 30], samples=2)) == [1, 0]


@pytest.mark.parametrize(("count", "replicas", "at_once"), [(0, 2, 3), (1, 3, 4), (7, 2, 2), (20, 3, 4), (5, 1, 64)])
def test_every_request_is_taken_once(count, replicas, at_once):
    counters = Counters()
    order = list(range(count))[::-1]
    queues = [RequestQueue(order, counters, replica, replicas, at_once) for replica in range(replicas)]
    taken = [[] for _ in queues]
    while not all(queue.exhausted for queue in queues):
        for queue, own in zip(queues, taken, strict=True):
            if (number := queue.take()) is not None:
                own.append(number)
    assert sorted(chain(*taken)) == list(range(count))
    assert all(queue.take() is None for queue in queues)


def test_the_first_ones_are_dealt_however_early_a_replica_asks():
    counters = Counters()
    first, second = (RequestQueue(list(range(10)), counters, replica, 2, 4) for replica in range(2))
    assert [first.take() for _ in range(5)] == [0, 2, 4, 6, 8]
    assert [second.take() for _ in range(5)] == [1, 3, 5, 7, 9]
