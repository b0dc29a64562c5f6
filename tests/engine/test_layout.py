"""The grid that is chosen where none is asked for: as many replicas as memory allows."""

import numpy as np
import pytest
from model_shapes import SHAPES

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.layout import OVERHEAD, USABLE, Cut, auto_grid, check_pages, layers_that_fit, rank_shares, replica_pages
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.kernels.numerics import PAGE
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.kv_cache import longest_text, pages_in_a_part
from llama_hpc.model.shares import StageShare, stage_shares

LLAMA = SHAPES["Llama-3-8B"]
GIB = 1 << 30


def chosen(config=LLAMA, weights="f32", ranks=8, per_node=8, memory=64 * GIB, requests=1000, max_seqs=1, max_seq_len=1024):
    return str(auto_grid(config, weights, ranks, per_node, memory, requests, max_seqs, max_seq_len))


def memory_for(shape, weights="f32", sequences=1, max_seq_len=1024, config=LLAMA):
    """Memory of a rank that just suffices for a grid."""
    need = max(rank.weights + rank.cache for rank in rank_shares(config, weights, shape, sequences * max_seq_len))
    return int((need + OVERHEAD) / USABLE) + 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 12])
def test_a_model_that_fits_on_a_rank_is_replicated(ranks):
    assert chosen(SHAPES["SmolLM2-135M"], ranks=ranks, memory=8 * GIB) == f"{ranks}x1x1"


@pytest.mark.parametrize(("needed", "shape"), [(2, "4x1x2"), (4, "2x1x4"), (8, "1x1x8")])
def test_tensor_ranks_share_a_model_that_is_too_large_for_one(needed, shape):
    assert chosen(memory=memory_for(GridShape(1, 1, needed))) == shape
    # 32 GB of float32 weights: half of it fits, with room for the program, into 20 GiB.
    assert chosen(memory=20 * GIB) == "4x1x2"


def test_replicas_divide_the_ranks():
    """Six ranks of which a replica needs four: the smallest divisor from four on."""
    assert chosen(ranks=6, memory=memory_for(GridShape(1, 1, 4))) == "1x1x6"


def test_tensor_groups_stay_within_a_node():
    assert chosen(per_node=2, memory=memory_for(GridShape(1, 4, 2))) == "1x4x2"
    assert chosen(per_node=1, memory=memory_for(GridShape(1, 8, 1))) == "1x8x1"
    # Three tensor ranks would straddle nodes of four.
    assert chosen(ranks=12, per_node=4, memory=memory_for(GridShape(1, 1, 3))) == "3x1x4"


def test_stages_take_over_where_heads_run_out():
    few = ModelConfig("llama", 4096, 14336, 32, 2, 2, 128, 32000, 1024)
    assert chosen(few, memory=memory_for(GridShape(1, 4, 2), config=few)) == "1x4x2"


def test_fewer_sequences_or_smaller_weights_leave_room_for_more_replicas():
    memory = memory_for(GridShape(1, 1, 1), sequences=2)
    assert chosen(memory=memory, max_seqs=2) == "8x1x1"
    assert chosen(memory=memory, max_seqs=3) == "4x1x2"
    # A replica never answers more at a time than its share of the prompts.
    assert chosen(memory=memory, max_seqs=16, requests=16) == "8x1x1"
    assert chosen(memory=memory, max_seqs=2, max_seq_len=2048) == "4x1x2"
    assert chosen(memory=20 * GIB, weights="q8") == "8x1x1"


def test_the_next_byte_missing_takes_the_next_grid():
    enough = memory_for(GridShape(1, 1, 1))
    assert chosen(memory=enough) == "8x1x1"
    assert chosen(memory=enough - 16) == "4x1x2"


def test_a_model_that_does_not_fit_is_refused_with_numbers():
    with pytest.raises(UsageError) as caught:
        chosen(ranks=2, memory=8 * GIB, max_seqs=4)
    message = str(caught.value)
    need = max(r.weights + r.cache for r in rank_shares(LLAMA, "f32", GridShape(1, 1, 2), 4 * 1024)) / GIB
    assert f"{need:.1f} GiB" in message and f"{(8 * GIB * USABLE - OVERHEAD) / GIB:.1f} GiB" in message
    assert "1x1x2" in message and "--weights" in message and "--max-seqs" in message and "\n" not in message
    with pytest.raises(UsageError, match=r"a rank may use 0\.0 GiB"):
        chosen(memory=0)


def test_the_refusal_speaks_of_a_grid_that_exists():
    """Seven ranks cannot share a model of 4 layers and 2 heads: each would hold all of it."""
    few = ModelConfig("llama", 4096, 14336, 4, 2, 2, 128, 32000, 1024)
    with pytest.raises(UsageError, match="7x1x1"):
        chosen(few, ranks=7, memory=GIB)


def test_shares_of_all_ranks_in_rank_order():
    shape = GridShape(2, 3, 2)
    ranks = rank_shares(SHAPES["SmolLM2-135M"], "q8", shape, 1000)
    assert [(r.data, r.stage_index, r.tensor_index) for r in ranks] == \
        [(d, p, t) for d in range(2) for p in range(3) for t in range(2)]
    assert [r.stage.first for r in ranks] == [r.stage_index == 0 for r in ranks]
    assert [r.stage.last for r in ranks] == [r.stage_index == 2 for r in ranks]
    # Both replicas hold the same.
    assert [(r.weights, r.cache) for r in ranks[:6]] == [(r.weights, r.cache) for r in ranks[6:]]


def test_cache_of_a_rank():
    """float16 keys and values of the KV heads it holds: 32 layers x 1,000 positions x 2 x 2 heads x 128 x 2 bytes."""
    ranks = rank_shares(LLAMA, "q8", GridShape(1, 1, 4), 1000)
    assert [r.cache for r in ranks] == [32 * 1000 * 2 * 2 * 128 * 2] * 4
    assert [r.cache for r in rank_shares(LLAMA, "f32", GridShape(1, 1, 4), 1000)] == [32 * 1000 * 2 * 2 * 128 * 4] * 4
    # int8, and a float16 scale for each of the heads' 128 values.
    assert [r.cache for r in rank_shares(LLAMA, "q8", GridShape(1, 1, 4), 1000, "q8")] == [32 * 1000 * 2 * 2 * (128 + 2)] * 4


@pytest.mark.parametrize(("tensor", "memory"), [(1, [2 * GIB, 3 * GIB, 5 * GIB]), (3, [GIB, 2 * GIB, 3 * GIB // 2])])
@pytest.mark.parametrize("positions", [1, 1000])
def test_layers_that_fit_are_the_most(tensor, memory, positions):
    """Of every stage: with so many layers its ranks have the memory, with one more some rank has not."""
    shape = GridShape(2, 3, tensor)
    most = layers_that_fit(LLAMA, "q8", shape, memory, positions)
    assert min(most) > 0 and max(most) < LLAMA.num_layers
    for more, fits in ((0, True), (1, False)):
        stages = [StageShare(range(count + more), number == 0, number == 2) for number, count in enumerate(most)]
        ranks = rank_shares(LLAMA, "q8", GridShape(1, 3, tensor), -(-positions // PAGE) * PAGE, stages=stages)
        for stage in range(3):
            need = max(r.weights + r.cache for r in ranks if r.stage_index == stage)
            assert (need <= int(memory[stage] * USABLE) - OVERHEAD) == fits
    assert layers_that_fit(LLAMA, "q8", shape, [GIB // 4, memory[1], 99 * GIB], positions) == [0, most[1], LLAMA.num_layers]


def test_pages_of_a_cut():
    """As many as the stage of least room holds, of its own layers in its own memory."""
    shape, stages = GridShape(1, 2, 1), stage_shares(LLAMA, 2, [1, 9])
    layers = [len(stage.layers) for stage in stages]
    assert layers == [30, 2]
    weights, page = ([r.weights for r in rank_shares(LLAMA, "q8", shape, 0, stages=stages)], PAGE * 2 * 8 * 128 * 2)
    def memory(stage, pages):
        return int((weights[stage] + pages * layers[stage] * page + OVERHEAD) / USABLE) + 2
    assert replica_pages(LLAMA, "q8", shape, Cut(stages, [memory(0, 100), memory(1, 7)]), None) == 7
    assert replica_pages(LLAMA, "q8", shape, Cut(stages, [memory(0, 5), memory(1, 7000)]), None) == 5
    assert replica_pages(LLAMA, "q8", shape, Cut(stages, [1, 1]), 60 * page) == 2


def test_weights_of_a_rank_are_about_its_part_of_the_whole():
    whole = rank_shares(LLAMA, "q8", GridShape(1, 1, 1), 0)[0].weights
    for shape in (GridShape(1, 1, 8), GridShape(1, 4, 1), GridShape(1, 2, 4)):
        parts = [r.weights for r in rank_shares(LLAMA, "q8", shape, 0)]
        assert whole <= sum(parts) < 1.01 * whole
        assert max(parts) < 1.2 * whole / shape.size


@pytest.mark.parametrize(("pages", "in_q8", "suggested"), [(2, 3, True), (2, 2, False), (1, 1, False)])
@pytest.mark.parametrize("chosen", [True, False])
def test_a_smaller_cache_format_is_suggested_where_it_helps(pages, in_q8, suggested, chosen):
    """A prompt of 40 and up to 5 more tokens take three pages."""
    request = ReadyRequest(0, "a", np.arange(40, dtype=np.int32), SamplingParams(), 5)
    with pytest.raises(UsageError, match=f"holds {16 * pages} tokens, but request 'a' needs 45") as caught:
        check_pages(pages, in_q8, [request], chosen)
    assert ("--kv-cache q8" in str(caught.value)) == suggested
    assert ("raise --kv-memory" in str(caught.value)) == chosen
    check_pages(3, in_q8, [request], chosen)


def test_a_grid_is_not_refused_with_what_is_on_already():
    for kv_cache, suggested in (("auto", True), ("f16", True), ("q8", False)):
        with pytest.raises(UsageError) as caught:
            auto_grid(LLAMA, "q8", 1, 1, 8 * GIB, 1, 1, 1024, kv_cache=kv_cache)
        assert ("--kv-cache q8" in str(caught.value)) == suggested
def test_ranks_that_deal_out_positions_hold_a_part_of_the_cache():
    """Llama-3-8B has 8 KV heads: on 16 tensor ranks two hold the same one, unless they share its positions."""
    shape = GridShape(1, 1, 16)
    def cache(context):
        return [r.cache for r in rank_shares(LLAMA, "q8", shape, 4096, context=context)]
    assert cache(2) == [c // 2 for c in cache(1)] == [4096 // 2 * 32 * 2 * 128 * 2] * 16
    assert [r.share.kv_heads for r in rank_shares(LLAMA, "q8", shape, 0, context=4)][:5] == [range(2)] * 4 + [range(2, 4)]


def test_the_grid_suits_the_groups_that_deal_out_positions():
    fits = {"memory_per_rank": 64 * GIB, "requests": 8, "max_seqs": 1, "max_seq_len": 1024}
    def grid(ranks, context):
        return str(auto_grid(LLAMA, "q8", ranks, ranks, **fits, context=context))
    assert (grid(8, 1), grid(8, 2), grid(8, 4), grid(6, 3)) == ("8x1x1", "4x1x2", "2x1x4", "2x1x3")
    with pytest.raises(UsageError, match="no grid of 8 ranks has tensor ranks in groups of --context-parallel 3"):
        grid(8, 3)


@pytest.mark.parametrize(("pages", "parts", "tokens"), [(40, 1, 640), (40, 2, 2 * 256 + 4 * 16), (64, 2, 1024), (30, 2, 240)])
def test_the_longest_text_that_a_cache_holds(pages, parts, tokens):
    assert longest_text(pages, parts) == tokens
    assert pages_in_a_part(tokens, parts) * parts <= pages < pages_in_a_part(tokens + 1, parts) * parts
