"""Schedules: every task once, what each promises by its counters, settings, and whose memory weights lie in."""

import numpy as np
import pytest
from traced_loops import LATE, SLOW, TOGETHER, Trace

from llama_hpc.kernels.cpu import products, workers
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product
from llama_hpc.kernels.cpu.placement import PAGE
from llama_hpc.kernels.cpu.places import Caches
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.team import SCHEDULES
from llama_hpc.kernels.cpu.weights import allocate
from llama_hpc.kernels.cpu.workers import NumaHint, Pool, WorkDistribution, WorkStealingStats
from llama_hpc.kernels.formats import Blocks


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_every_task_once(pool, threads):
    """All schedules and sizes one after the other in one program, several times: what one loop leaves behind meets the next."""
    team, traces = pool(threads), []
    program = Program(team)
    for total in (0, 1, 2, 7, 64, 1000):
        for schedule in SCHEDULES:
            for settings in ((1, 1, 4), (3, 64, 1), (64, 4096, 4)):
                traces.append(Trace(team, WorkDistribution(schedule, *settings), total, program=program))
    for times in range(1, 6):
        program.run()
        for trace in traces:
            assert (trace.hits[:-1] == times).all() and trace.hits[-1] == 0
    assert set(np.concatenate([trace.owners for trace in traces])) <= set(range(threads))
    if threads > 1:
        assert all(tasks > 0 for tasks in team.stats().tasks_of_member)


def test_early_thieves_find_nothing_of_the_loop_before(pool):
    """Short loops of changing lengths, back to back, with more members than cores."""
    team = pool(4)
    program, work = Program(team), WorkDistribution("steal", 1, 2)
    traces = [Trace(team, work, total, program=program) for total in range(100)]
    for times in range(1, 21):
        program.run()
        assert all((trace.hits[:-1] == times).all() and trace.hits[-1] == 0 for trace in traces)


def test_dynamic_keeps_to_its_bounds(pool):
    team = pool(2)
    for settings, expected in (((8, 16, 1), 16), ((8, 16, 1000), 8), ((1, 4096, 4), 125)):
        *chunks, tail = Trace(team, WorkDistribution("dynamic", *settings), 1000).run().sizes
        assert set(chunks) == {expected} and 1 <= tail <= expected
    # Bounds count rows, tasks are panels of four.
    assert set(Trace(team, WorkDistribution("dynamic", 8, 16, 1), 1000, unit=4).run().sizes) == {4}


@pytest.mark.parametrize("schedule", ["dynamic", "guided", "steal"])
def test_a_large_min_chunk_leaves_no_thread_without_work(pool, schedule):
    """The smallest chunk is for long loops; of a short one everybody gets a part."""
    sizes = Trace(pool(2), WorkDistribution(schedule, 64, 4096), 18).run().sizes
    assert len(sizes) >= 2 and max(sizes) == 9


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_tasks_per_thread(pool, pieces):
    team = pool(2)
    Trace(team, WorkDistribution("dynamic", 1, 4096, pieces), 1600).run()
    stats = team.stats()
    assert stats.tasks_created == sum(stats.tasks_of_member) == 2 * pieces
    team.reset()
    assert team.stats().tasks_created == 0


def test_static_gives_everybody_one_range(pool):
    team = pool(3)
    trace = Trace(team, WorkDistribution("static"), 100).run()
    assert trace.sizes == [33, 33, 34] and team.stats().tasks_of_member == (1, 1, 1)
    assert trace.owners[:-1].tolist() == [0] * 33 + [1] * 33 + [2] * 34


def test_guided_shrinks(pool):
    sizes = Trace(pool(2), WorkDistribution("guided", 5, 200), 1000).run().sizes
    assert sizes[0] == 200 and sizes == sorted(sizes, reverse=True) and set(sizes[-4:-1]) == {5} and len(sizes) > 10


def test_nested_deals_out_a_range_inside_its_group(pool):
    team, work = pool(4), WorkDistribution("nested", 1, 10)
    assert work.record(4)["groups"] == 2
    for _ in range(3):
        owners = Trace(team, work, 1000).run().owners
        assert set(owners[:500]) <= {0, 1} and set(owners[500:-1]) <= {2, 3}
    uneven = Trace(pool(3), WorkDistribution("nested", 1, 10, groups=2), 300).run().owners
    assert set(uneven[:200]) <= {0, 1} and set(uneven[200:-1]) == {2}
    single = Trace(team, WorkDistribution("nested", 1, 10, groups=9), 100).run()
    assert single.owners[:-1].tolist() == [0] * 25 + [1] * 25 + [2] * 25 + [3] * 25 and len(single.sizes) > 4


def test_steal_takes_from_a_slow_member_and_adapts(pool):
    """Chunks of the robbed member: half the size after each loop with a theft, twice the size after each without."""
    team, work = pool(2), WorkDistribution("steal", 1, 4096, 4)
    slow, together = Trace(team, work, 1024, SLOW), Trace(team, work, 1024, TOGETHER)
    found = [slow.run().sizes[0] for _ in range(6)]
    assert found == [128, 64, 32, 16, 8, 8] and slow.owners[511] == 1
    stats = team.stats()
    assert stats.tasks_stolen >= 6 and 0 < stats.steal_ratio() == stats.tasks_stolen / stats.tasks_created < 1
    together.run()
    team.reset()
    assert [together.run().sizes[0] for _ in range(6)] == [16, 32, 64, 128, 256, 256]
    assert team.stats().tasks_stolen == 0 and team.stats().steal_ratio() == 0
    assert together.owners[:-1].tolist() == [0] * 512 + [1] * 512


@pytest.mark.parametrize("mode", [SLOW, LATE])
def test_steal_with_one_slow_member_of_many(pool, mode):
    """Nobody waits for what a member that is held up, or has not come to the loop, has not begun."""
    team = pool(5)
    trace = Trace(team, WorkDistribution("steal", 1, 4), 500, mode)
    for _ in range(300):
        assert trace.run().owners[99] != 0
    assert team.stats().tasks_stolen >= 300


def test_tiled_hands_out_blocks_of_a_product(pool):
    """256 rows x 12 tokens in blocks of 64 x 5, and with the defaults; each block counts as one task."""
    team, weights = pool(2), allocate("f32", 256, Blocks(64, 64))
    x, tokens, out = Activation(12, 64, 64, False), np.array([12]), np.zeros((12, 256), np.float32)
    for settings, blocks in (((64, 5), 4 * 3), ((128, 12), 2), ((0, 0), 1)):
        program, work = Program(team), WorkDistribution("tiled", tile_rows=settings[0], tile_tokens=settings[1])
        if settings == (0, 0):
            blocks = -(-256 // int(work.record(2)["tile_rows"][0])) * -(-12 // int(work.record(2)["tile_tokens"][0]))
        add_product(program, "product", x, [weights.part(out)], weights.layout, tokens, products.FLOAT, work)
        team.reset()
        program.run()
        assert team.stats().tasks_created == blocks


def test_settings_by_default_come_from_threads_and_caches(monkeypatch):
    assert [int(WorkDistribution("nested").record(threads)["groups"][0]) for threads in (1, 2, 4, 8, 9, 64)] == [1, 1, 2, 2, 3, 8]
    tiles = []
    for l2 in (256 << 10, 1 << 20, 2 << 20):
        monkeypatch.setattr(workers.places, "cache_sizes", lambda l2=l2: Caches(32 << 10, l2, 8 << 20, 4))
        row = WorkDistribution("tiled").record(2)[0]
        tiles.append((int(row["tile_rows"]), int(row["tile_tokens"])))
    assert tiles == sorted(set(tiles)) and all(rows % 32 == 0 and tokens >= 48 for rows, tokens in tiles)
    row = WorkDistribution("tiled", 64, 512, 3, groups=5, tile_rows=96, tile_tokens=7).record(8, 32)[0]
    assert row.tolist() == (SCHEDULES.index("tiled"), 2, 16, 3, 5, 96, 7)


def test_sensible_values_for_products_and_attention():
    for rows, cols in ((576, 576), (1536, 576), (4096, 4096), (28672, 8192), (49152, 576), (32, 100_000), (5, 64)):
        work = WorkDistribution.for_matmul(rows, cols)
        assert work.min_chunk % 32 == 0 and work.min_chunk <= max(32, rows) and work.max_chunk >= work.min_chunk
        assert work.min_chunk == 32 or work.min_chunk * cols <= 1 << 18
    assert WorkDistribution.for_matmul(64, 64, "guided").schedule == "guided"
    assert [WorkDistribution.for_attention(32, length).min_chunk for length in (1, 16, 256, 100_000)] == [32, 16, 1, 1]
    assert WorkDistribution.for_attention(8, 0).max_chunk == 8


@pytest.mark.parametrize(("settings", "message"), [
    ({"schedule": "random"}, "static, dynamic, guided"), ({"min_chunk": 0}, "min_chunk"),
    ({"min_chunk": 9, "max_chunk": 8}, "9 and 8"), ({"tasks_per_thread": 0}, "tasks_per_thread"),
    ({"groups": -1}, "groups .* -1"), ({"tile_rows": -1}, "tile_rows"),
    ({"tile_tokens": -2}, "tile_tokens"), ({"numa": "local"}, "NumaHint.local"),
])
def test_wrong_distributions(settings, message):
    with pytest.raises(ValueError, match=message):
        WorkDistribution(**settings)


def test_wrong_hints_and_pools():
    with pytest.raises(ValueError, match="'near'"):
        NumaHint("near")
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    with pytest.raises(ValueError, match=r"3 threads .* not 2"):
        Pool(3, bind=[{0}, {0}])
    assert NumaHint.local() == NumaHint("local") != NumaHint.interleaved()
    assert WorkStealingStats(0, 0, (0,), 0).steal_ratio() == 0 and workers.num_cpus() >= 1


@pytest.mark.parametrize("weights_format", ["f32", "f16", "q8", "q4"])
def test_weights_are_touched_by_the_pool(pool, weights_format):
    """Local: each member its own range at once; interleaved: 2 MiB pages by turns. Memory that was used before becomes zero."""
    team, blocks, rows = pool(3), Blocks(2048, 256), 2000
    serial = allocate(weights_format, rows, blocks)
    assert team.stats().tasks_created == 0
    for numa, tasks in ((None, {1}), (NumaHint.local(), {1}), (NumaHint.interleaved(), set(range(9)))):
        used = np.full(serial.data.nbytes, 1, np.uint8)
        del used
        team.reset()
        weights = allocate(weights_format, rows, blocks, pool=team, work=numa and WorkDistribution(numa=numa))
        assert weights.data.shape == serial.data.shape and weights.data.dtype == serial.data.dtype and not weights.data.any()
        assert set(team.stats().tasks_of_member) <= tasks
    start = weights.data.__array_interface__["data"][0]
    pages = range(start // PAGE, (start + weights.data.nbytes - 1) // PAGE + 1)
    assert team.stats().tasks_of_member == tuple(sum(page % 3 == member for page in pages) for member in range(3))


def test_a_share_without_columns_has_nothing_to_touch(pool, capfd):
    for weights_format in ("f32", "q8"):
        assert allocate(weights_format, 64, Blocks(0, 32), pool=pool(2)).data.size == 0
    assert capfd.readouterr().err == ""
