"""Who does what once ranks are lost: decisions that all ranks make alike."""

import numpy as np
import pytest

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.engine.shifts import State, hosts_memory, left, new_groups, whole_replicas
from llama_hpc.grid import GridShape


def state(replica=None, ranks=0, host="a", memory=100):
    return State(replica, ranks, (), (), True, None, 0, 2, None, {}, host, memory)


def test_a_replica_is_whole_when_all_its_ranks_can_go_on():
    states = [state(0, 2), state(1, 2), state(0, 2), state(), state(2, 1)]
    assert whole_replicas(states) == {0, 2}


def none_smaller(ranks, must):
    assert not must
    return None


@pytest.mark.parametrize("free, requests, expected", [
    ([1, 2, 5, 6], 9, [([1, 2, 5, 6], GridShape(2, 1, 2))]),
    ([1, 2, 5], 9, [([1, 2], GridShape(1, 1, 2))]),
    ([1, 2, 5, 6], 1, [([1, 2], GridShape(1, 1, 2))]),
    ([4], 9, []), ([], 9, [])])
def test_replicas_of_the_usual_shape_as_long_as_there_are_ranks_and_requests(free, requests, expected):
    assert new_groups(free, GridShape(3, 1, 2), requests, True, none_smaller) == expected


def test_the_rest_forms_a_smaller_one_where_memory_allows():
    asked = []
    def smaller(ranks, must):
        asked.append((list(ranks), must))
        return GridShape(1, 1, len(ranks))
    usual = GridShape(2, 2, 2)
    assert new_groups([0, 3, 4], usual, 5, False, smaller) == [([0, 3, 4], GridShape(1, 1, 3))]
    assert new_groups([0, 1, 2, 3, 4], usual, 5, False, smaller)[1] == ([4], GridShape(1, 1, 1))
    assert new_groups([0, 3, 4], usual, 5, True, smaller)
    # Only where there would be no replica at all it has to be found.
    assert asked == [([0, 3, 4], True), ([4], False), ([0, 3, 4], False)]


def test_what_is_left_is_neither_done_nor_taken():
    ready = [ReadyRequest(i, str(i), np.arange(1 + i, dtype=np.int32), SamplingParams(n=2, temperature=1.0), 4) for i in range(4)]
    done = frozenset({(0, 0), (0, 1), (1, 0)})
    assert left(ready, done, {3}) == ([2, 1], None)


def test_memory_is_shared_by_the_ranks_of_a_host():
    states = [state(host="a", memory=90), state(host="a", memory=80), state(host="b", memory=70), state(host="b")]
    assert hosts_memory(states, [0, 1, 2]) == (1, 40)
    # That of a GPU is one rank's.
    states[:2] = [state(host="a", memory=60)._replace(own_memory=True), state(host="a", memory=80)._replace(own_memory=True)]
    assert hosts_memory(states, [0, 1, 2]) == (1, 60)
