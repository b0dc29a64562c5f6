"""Memory that runs short: when the leader shrinks the cache, by how much, and when it grows again."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from mpi4py import MPI

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine import pressure
from llama_hpc.engine.pages import PagePool
from llama_hpc.engine.pressure import Pressure
from llama_hpc.engine.queue import COUNTERS, PRESSURE
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.kv_cache import KVCache

GIB, COUNT, LEAST = 1 << 30, 96, 16


class Replica:
    """A rank alone, whose node has ``left`` bytes of 10 GiB; ``second`` passes between looks."""

    def __init__(self, monkeypatch):
        self.left, self.now = 5 * GIB, 0.0
        monkeypatch.setattr(pressure, "memory_limits", lambda: [(80 * GIB, 100 * GIB), (self.left, 10 * GIB)])
        monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.counters = SharedCounters(MPI.COMM_SELF, COUNTERS + 1)
        self.pool = PagePool(COUNT, sharing=False)
        self.given_back = []
        cache = SimpleNamespace(give_back=self.given_back.append)
        stage = SimpleNamespace(cache=cache, share=SimpleNamespace(context_index=0))
        self.pressure = Pressure(self.counters, 0, self.pool, stage, LEAST * PAGE)

    def second(self, count=1):
        """Returns the pages that may be in use afterwards."""
        for _ in range(count):
            self.now += 1
            self.pressure.look()
            self.pressure.decide()
        return self.pressure.pages


@pytest.fixture
def replica(monkeypatch):
    return Replica(monkeypatch)


def test_with_room_all_pages_may_be_used(replica):
    assert replica.second(100) == COUNT and replica.counters.read(PRESSURE) == 0


def test_short_memory_stops_the_growth_and_very_short_memory_shrinks_the_cache(replica):
    for _ in range(80):
        replica.pool.take()
    replica.left = int(0.04 * 10 * GIB)
    assert replica.second() == 80 and replica.second(20) == 80
    replica.left = int(0.02 * 10 * GIB)
    # An eighth less each time, with time in between to see what has come of it.
    assert replica.second() == 70 and replica.second(2) == 70 and replica.second() == 61
    assert replica.second(100) == LEAST


def test_it_grows_again_once_there_is_room_for_a_while(replica):
    replica.left = 0
    assert replica.second(5) == LEAST
    replica.left = 5 * GIB
    assert replica.second(29) == LEAST and replica.second(3) == 21
    assert replica.second(300) == COUNT


def test_who_follows_gives_back_the_pages_without_content(replica):
    held = [replica.pool.take() for _ in range(20)]
    replica.pool.release(held[10:])
    replica.pool.withhold(32)
    replica.pressure.follow(32)
    assert replica.pressure.events == 1 and replica.pool.touched == 10
    assert sorted(replica.given_back[0] + held[:10]) == list(range(COUNT))
    replica.pressure.follow(32)
    replica.pressure.follow(64)
    assert replica.pressure.events == 1 and len(replica.given_back) == 1


def test_it_is_said_once(replica, logged):
    replica.left = 0
    replica.second(20)
    (record,) = logged
    assert record.getMessage().startswith("memory is short on ") and record.levelname == "WARNING"
    assert ", 0.0 KiB of 10.00 GiB left: batches shrink" in record.getMessage()


@pytest.mark.parametrize("dtype", [np.uint16, np.int8])
def test_memory_of_pages_goes_back_to_the_system(dtype):
    """Also that of parts of huge pages, and the neighbours keep what they hold."""
    cache = KVCache(range(4), 3, 64, 1, PAGE, dtype, count=3000)
    whole = [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]
    for pool in whole:
        pool[:] = 7
    before = psutil.Process().memory_info().rss
    gone = [page for page in range(3000) if page % 100 >= 25]
    cache.give_back(gone)
    assert before - psutil.Process().memory_info().rss > 0.7 * 0.75 * cache.nbytes
    for pool in whole:
        left = pool[np.setdiff1d(np.arange(3000), gone)]
        assert (left == 7).all()
        pool[gone] = 1
