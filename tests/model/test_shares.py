"""Who holds what: nothing is lost, nothing is held twice but KV heads, and no stage is costlier than it must be."""

from itertools import combinations

import pytest
from model_shapes import SHAPES

from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.kernels.numerics import down_block
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.shares import TensorShare, check_grid, stage_shares

models = pytest.mark.parametrize("name", SHAPES)


def shares(config):
    """(tensor ranks, the share of each) for every number of tensor ranks that a model allows."""
    for size in range(1, config.num_heads + 1):
        yield size, [TensorShare.of(config, size, index) for index in range(size)]


def joined(ranges):
    return [i for held in ranges for i in held]


@models
def test_everything_is_held_once(name):
    config = SHAPES[name]
    for _, held in shares(config):
        assert joined(s.query_heads for s in held) == list(range(config.num_heads))
        assert joined(s.ffn for s in held) == list(range(config.intermediate_size))
        assert joined(s.vocabulary for s in held) == list(range(config.vocab_size))


@models
def test_a_rank_holds_the_kv_heads_of_its_query_heads_and_no_other(name):
    config = SHAPES[name]
    for _, held in shares(config):
        for share in held:
            assert len(share.query_heads) >= 1
            assert set(share.kv_heads) == {head * config.kv_heads // config.num_heads for head in share.query_heads}
        assert {head for share in held for head in share.kv_heads} == set(range(config.kv_heads))


@models
def test_shares_are_even(name):
    config = SHAPES[name]
    block = down_block(config.intermediate_size)
    for size, held in shares(config):
        for ranges, grain in (([s.query_heads for s in held], 1), ([s.ffn for s in held], block),
                              ([s.vocabulary for s in held], 16)):
            sizes = [-(-len(r) // grain) for r in ranges]
            assert max(sizes) - min(sizes) <= 1, (size, sizes)


@models
def test_the_ffn_is_cut_at_reduction_blocks_only(name):
    """A block that lay on two ranks would be summed in another order than on one."""
    config = SHAPES[name]
    for _, held in shares(config):
        assert all(s.ffn.start % down_block(config.intermediate_size) == 0 for s in held if len(s.ffn))


def test_known_cuts():
    """9 query heads over 3 KV heads on two ranks straddle the middle one; 6 FFN blocks leave 2 of 8 ranks without one."""
    left, right = (TensorShare.of(SHAPES["SmolLM2-135M"], 2, i) for i in range(2))
    assert (left.query_heads, left.kv_heads) == (range(0, 4), range(0, 2))
    assert (right.query_heads, right.kv_heads) == (range(4, 9), range(1, 3))
    tiny = [TensorShare.of(SHAPES["stories260K"], 8, i) for i in range(8)]
    assert sorted(len(s.ffn) for s in tiny) == [0, 0, 12, 32, 32, 32, 32, 32]


@pytest.mark.parametrize(("intermediate_size", "block"), [
    (14336, 256), (28672, 256), (5632, 256), (4864, 256), (4096, 256), (3841, 256), (3840, 128), (1921, 128), (1920, 64),
    (1536, 64), (961, 64), (960, 32), (768, 32), (172, 32), (1, 32),
])
def test_the_reduction_block_of_the_ffn(intermediate_size, block):
    """256, or less where that leaves fewer than 16 blocks: fixed by the model alone, for results depend on it."""
    assert down_block(intermediate_size) == block


@models
def test_stages_cover_all_layers_in_order(name):
    config = SHAPES[name]
    for count in range(1, config.num_layers + 1):
        stages = stage_shares(config, count)
        assert len(stages) == count
        assert joined(s.layers for s in stages) == list(range(config.num_layers))
        assert all(len(s.layers) >= 1 for s in stages)
        assert [s.first for s in stages] == [True] + [False] * (count - 1)
        assert [s.last for s in stages] == [False] * (count - 1) + [True]


@pytest.mark.parametrize("layers", range(1, 10))
@pytest.mark.parametrize("vocab", [64, 1000, 8000, 40000, 10**6])
def test_no_other_split_has_a_cheaper_costliest_stage(layers, vocab):
    """Against all splits; a layer costs its weights, and the last stage has the output head for every other token besides."""
    config = ModelConfig("llama", 64, 172, layers, 4, 2, 16, vocab, 128)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172
    def costliest(counts):
        return max([n * layer for n in counts[:-1]] + [counts[-1] * layer + vocab * 64 / 2])
    for stages in range(1, layers + 1):
        cuts = combinations(range(1, layers), stages - 1)
        splits = [[b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)] for cut in cuts]
        found = [len(s.layers) for s in stage_shares(config, stages)]
        assert costliest(found) == min(map(costliest, splits)), found


@pytest.mark.parametrize("seconds", [(1, 1, 1), (1, 2, 7), (7, 2, 1), (3, 1, 3), (1e-4, 3e-3, 1e-4)])
@pytest.mark.parametrize("most", [(9, 9, 9), (2, 9, 9), (9, 1, 9), (3, 3, 3), (9, 4, 1)])
@pytest.mark.parametrize("vocab", [64, 40000])
def test_no_other_split_among_unlike_stages_has_a_costlier_one_that_is_cheaper(seconds, most, vocab):
    """Against all splits that the stages have room for; the head takes the time of half its weights on the last stage."""
    config = ModelConfig("llama", 64, 172, 9, 4, 2, 16, vocab, 128)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172
    def costliest(counts):
        costs = [n * each for n, each in zip(counts, seconds, strict=True)]
        return max([*costs[:-1], costs[-1] + seconds[-1] * vocab * 64 / 2 / layer])
    splits = [(a, b - a, 9 - b) for a, b in combinations(range(1, 9), 2)]
    splits = [counts for counts in splits if all(n <= room for n, room in zip(counts, most, strict=True))]
    stages = stage_shares(config, 3, seconds, most)
    found = tuple(len(stage.layers) for stage in stages)
    assert found in splits and costliest(found) == pytest.approx(min(map(costliest, splits)), rel=1e-12)
    assert joined(stage.layers for stage in stages) == list(range(9))


def test_layers_follow_speed():
    """A GPU sixteen times as fast as the CPU beside it; and stages that are alike, told so or not."""
    config = SHAPES["Llama-3-70B"]
    assert [len(s.layers) for s in stage_shares(config, 2, [0.21, 3.4])] == [76, 4]
    assert [len(s.layers) for s in stage_shares(config, 2, [3.4, 0.21])] == [4, 76]
    assert [len(s.layers) for s in stage_shares(config, 2, [0.21, 3.4], [60, 80])] == [60, 20]
    for stages in (1, 2, 5, 80):
        counts = [[len(s.layers) for s in stage_shares(config, stages, told)] for told in (None, [0.3] * stages)]
        assert sorted(counts[0][:-1]) == sorted(counts[1][:-1]) and counts[0][-1] == counts[1][-1]


def test_the_output_head_counts_as_often_as_it_is_needed():
    """In TinyLlama's shape it takes the time of one and a half layers, in Llama-3-8B's of more than two."""
    def counts(config, outputs):
        return [len(stage.layers) for stage in stage_shares(config, 2, outputs=outputs)]
    tiny, large = SHAPES["TinyLlama-1.1B"], SHAPES["Llama-3-8B"]
    assert [counts(tiny, outputs) for outputs in (0, 0.5, 0.7, 1)] == [[11, 11], [11, 11], [12, 10], [12, 10]]
    assert [counts(large, outputs) for outputs in (0, 0.5, 1)] == [[16, 16], [17, 15], [17, 15]]


def test_grids_that_a_model_allows():
    config = SHAPES["SmolLM2-135M"]
    check_grid(config, GridShape(1000, 30, 9))
    with pytest.raises(UsageError, match=r"grid 1x1x10: .*tensor dimension is 10.*9 query heads; use at most 9"):
        check_grid(config, GridShape(1, 1, 10))
    with pytest.raises(UsageError, match=r"grid 1x31x1: .*pipeline dimension is 31.*30 layers; use at most 30"):
        check_grid(config, GridShape(1, 31, 1))


@models
def test_a_group_that_deals_out_positions_holds_the_kv_heads_of_all_its_ranks(name):
    config = SHAPES[name]
    for size, alone in shares(config):
        for context in (n for n in range(2, size + 1) if size % n == 0):
            held = [TensorShare.of(config, size, index, context) for index in range(size)]
            assert [(s.query_heads, s.ffn, s.vocabulary) for s in held] == [(s.query_heads, s.ffn, s.vocabulary) for s in alone]
            assert [s.context_index for s in held] == [*range(context)] * (size // context)
            for first in range(0, size, context):
                group, own = held[first : first + context], alone[first : first + context]
                assert len({(s.kv_heads, s.group_heads) for s in group}) == 1
                assert set(group[0].kv_heads) == {head for s in own for head in s.kv_heads}
                assert joined(s.query_heads for s in own) == list(group[0].group_heads)
