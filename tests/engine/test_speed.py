"""Layers by measured speed: which jobs measure, what the cut follows from, and that there is something to measure."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from model_shapes import SHAPES

from llama_hpc.engine import speed
from llama_hpc.engine.layout import OVERHEAD, USABLE, Cut, rank_shares
from llama_hpc.engine.speed import Pace, cut_layers, unlike
from llama_hpc.grid import GridShape
from llama_hpc.kernels import random_rows
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.model.shares import TensorShare, stage_shares

LLAMA, GIB = SHAPES["Llama-3-8B"], 1 << 30
SHAPE = GridShape(2, 2, 1)
SIZES = 1000, 4, 2048, 1024             # answers, sequences at a time, positions of the longest one and of a usual one
FAST, SLOW = ("H200", 0.001), ("", 0.02)


class Ranks:
    """The communicator of the first of some ranks, (stage, device, seconds, memory) each; counts what is asked."""

    def __init__(self, ranks):
        self.ranks, self.calls = ranks, 0

    def allgather(self, own):
        self.calls += 1
        named = [(stage, device or "CPU", seconds, memory) for stage, device, seconds, memory in self.ranks]
        found = [Pace(*rank) if isinstance(own, Pace) else rank[:2] for rank in named]
        assert found[0] == own
        return found

    def Barrier(self):
        pass


@pytest.fixture
def cut(monkeypatch):
    """The cut of a job of such ranks in the order of a grid, and whether it compiled; even memory is 64 GiB."""
    def find(*ranks, shape=SHAPE):
        stage, device, seconds, memory = ranks[0]
        job = SimpleNamespace(
            comm=Ranks(ranks), checkpoint=SimpleNamespace(config=LLAMA), weights="q8", kv_cache="f16", first=True, compiled=0,
            grid=SimpleNamespace(stage=stage, shape=shape), device=SimpleNamespace(name=device), memory=64 * GIB, outputs=0.5,
            settings=SimpleNamespace(context_parallel=1), own_memory=lambda: memory + 5)
        job.compile = lambda: setattr(job, "compiled", job.compiled + 1)
        monkeypatch.setattr(speed, "agreed", lambda comm, what: nullcontext())
        monkeypatch.setattr(speed, "layer_seconds", lambda job: seconds)
        return cut_layers(job, SIZES, 5), job.compiled
    return find


def ranks_of(*stages, memory=(64 * GIB, 64 * GIB)):
    """Two replicas; ``stages``: device and seconds of each."""
    return [(number, *found, memory[number]) for found_again in range(2) for number, found in enumerate(stages)]


def test_like_devices_measure_nothing(cut, logged):
    even = Cut.even(LLAMA, 2, 64 * GIB)
    assert cut(*ranks_of(FAST, FAST)) == cut(*ranks_of(SLOW, SLOW)) == (even, 0)
    assert cut(*ranks_of(FAST), (0, *SLOW, GIB), shape=GridShape(3, 1, 1)) == (Cut.even(LLAMA, 1, 64 * GIB), 0)
    # Each replica has one of either kind, but every stage waits for a slow one.
    assert cut((0, *FAST, GIB), (1, *SLOW, GIB), (0, *SLOW, GIB), (1, *FAST, GIB)) == (even, 0)
    assert not logged


def test_the_slowest_rank_of_a_stage_counts(cut, logged):
    """And its least memory, in whichever replica."""
    ranks = [(0, *FAST, 90 * GIB), (1, *SLOW, 64 * GIB), (0, "H200", 0.002, 70 * GIB), (1, "", 0.01, 50 * GIB)]
    assert cut(*ranks) == (Cut(stage_shares(LLAMA, 2, [0.002, 0.02]), [70 * GIB, 50 * GIB]), 1)
    assert logged[0].getMessage() == "layers by measured speed: stage 0 (H200) 2 ms a layer: 31; stage 1 (CPU) 20 ms a layer: 1"
    assert not unlike([(0, "A"), (1, "A")]) and unlike([(0, "A"), (1, "B")]) and unlike([(0, "A"), (1, "A"), (1, "B")])


def test_a_cut_fits_into_memory(cut, logged):
    """Room for all sequences that run at a time decides; where stages have not even that, room for the longest one."""
    whole = Cut.even(LLAMA, 2, 0)
    def needs(layers, positions, stage):
        stages = stage_shares(LLAMA, 2, [1, 1], layers)
        rank = rank_shares(LLAMA, "q8", GridShape(1, 2, 1), positions, stages=stages)[stage]
        return int((rank.weights + rank.cache + OVERHEAD) / USABLE) + 2
    def layers(*memory):
        return [len(stage.layers) for stage in cut(*ranks_of(FAST, SLOW, memory=memory))[0].stages]
    assert layers(needs([20, 12], 4 * 1024, 0), 64 * GIB) == [20, 12]
    assert layers(needs([20, 12], 2048, 0), 64 * GIB) == [19, 13]
    assert layers(needs([20, 12], 2048, 0), needs([20, 12], 2048, 1)) == [20, 12]
    logged.clear()
    found, compiled = cut(*ranks_of(FAST, SLOW, memory=(needs([20, 12], 2048, 0) - 1000, needs([20, 12], 2048, 1))))
    assert found.stages == whole.stages and found.memory == [64 * GIB] * 2 and compiled
    assert logged[0].getMessage().startswith("layers evenly, as memory has no room for another cut: stage 0 (H200) 1 ms a layer")


@pytest.mark.parametrize("weights,ranks", [("q3_5", 8), ("f32", 1)])
def test_a_layer_is_timed(weights, ranks, capfd, monkeypatch):
    """Of a model's share, also of one without FFN, on the threads of the job."""
    monkeypatch.setattr(random_rows, "BANK", 1 << 16)
    pool = Pool(1)
    try:
        share = TensorShare.of(SHAPES["stories260K"], ranks, 0)
        assert bool(share.ffn) == (ranks == 1)
        job = SimpleNamespace(checkpoint=SimpleNamespace(config=SHAPES["stories260K"]), share=share, weights=weights,
                              kv_cache="f16", pool=pool, gpu=None, grid=SimpleNamespace(shape=SHAPE))
        assert 0 < speed.layer_seconds(job) < 1
    finally:
        pool.close()
    assert capfd.readouterr().err == ""
