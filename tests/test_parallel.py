"""Layouts of models, and products and attention of arrays, in one process."""

import numpy as np
import pytest
from model_shapes import SHAPES

import llama_hpc
from llama_hpc import ParallelConfig, TensorParallelConfig, TensorParallelStrategy
from llama_hpc.errors import NumericsError, UsageError


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize(("config", "ranks", "shape"), [
    (ParallelConfig(), 6, None), (ParallelConfig(data=2, pipeline=3, tensor=1), 6, "2x3x1"),
    (ParallelConfig(strategy="data"), 5, "5x1x1"), (ParallelConfig.pipeline(4), 3, "1x3x1"),
    (ParallelConfig.pipeline(stages=2), 6, "3x2x1"),
    (ParallelConfig.tensor_parallel(2), 6, "3x1x2"), (ParallelConfig(strategy="tensor"), 3, "1x1x3")])
def test_layouts(config, ranks, shape):
    found = config.shape(ranks)
    assert (found and str(found)) == shape


def test_layouts_that_cannot_be():
    for arguments, message in (({"data": 0}, "data must be"), ({"strategy": "4d"}, "strategy must be one of"),
                               ({"strategy": "auto", "tensor": 2}, "strategy 3d"), ({"micro_batches": 0}, "micro_batches")):
        with pytest.raises(UsageError, match=message):
            ParallelConfig(**arguments)
    with pytest.raises(UsageError, match="has 3"):
        ParallelConfig.tensor_parallel(2).shape(3)
    assert ParallelConfig.pipeline(4).micro_batches == 4 and ParallelConfig(tensor=2).strategy == "3d"


def test_a_layout_by_memory():
    config = SHAPES["Llama-3-8B"]
    for memory, shape in ((1 << 40, "4x1x1"), (10 << 30, "2x1x2")):
        assert str(ParallelConfig.for_model(config, 4, memory=memory, max_seqs=8).shape(4)) == shape
    with pytest.raises(UsageError, match="may use"):
        ParallelConfig.for_model(config, 4, memory=1 << 30)


def test_shares_are_exact():
    for n in (0, 1, 7, 64):
        for size in (1, 2, 3, 5, 9):
            ranks = [TensorParallelConfig(size, rank) for rank in range(size)]
            assert [i for r in ranks for i in range(r.local_offset(n), r.local_offset(n) + r.local_size(n))] == list(range(n))
            assert max(r.local_size(n) for r in ranks) - min(r.local_size(n) for r in ranks) <= 1
    with pytest.raises(UsageError, match="rank 2 of 2"):
        TensorParallelConfig(2, 2)


def arrays(*shapes, seed=0, size=0.05):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * size).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("weights_format", ["f32", "f16", "q8", "q4"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_of_a_product_make_the_whole(weights_format, size):
    x, w, bias = arrays((5, 600), (70, 600), 70)
    whole = llama_hpc.matmul(x, llama_hpc.pack_weights(w, weights_format)) + bias
    assert np.abs(whole - (x @ w.T + bias)).max() < {"q4": 0.05, "q8": 0.005}.get(weights_format, 1e-4)
    columns, sums = [], None
    for rank in range(size):
        parallel = TensorParallelConfig(size, rank)
        rows, _ = TensorParallelStrategy.COLUMN.share(*w.shape, parallel)
        columns.append(llama_hpc.column_parallel_linear(x, llama_hpc.pack_weights(w[rows], weights_format), bias[rows]))
        _, own = TensorParallelStrategy.ROW.share(*w.shape, parallel, block=256)
        share = x[:, own], llama_hpc.pack_weights(w[:, own], weights_format)
        if rank + 1 < size:
            sums = llama_hpc.row_parallel_linear(*share, partial=True, others=sums)
    assert np.array_equal(bits(np.concatenate(columns, 1)), bits(whole))
    assert np.array_equal(bits(llama_hpc.row_parallel_linear(*share, bias, others=sums)), bits(whole))


@pytest.mark.parametrize("weights_format", ["f32", "q8"])
def test_shares_of_an_mlp_make_the_whole(weights_format):
    x, gate, up, down = arrays((5, 300), (130, 300), (130, 300), (70, 130), size=0.3)
    def share(own, **more):
        packed = [llama_hpc.pack_weights(w, weights_format, block)
                  for w, block in ((gate[own], 256), (up[own], 256), (down[:, own], 32))]
        return llama_hpc.mlp_tensor_parallel(x, *packed, **more)
    whole, pre = share(slice(None)), x @ gate.T
    expected = (pre / (1 + np.exp(-pre)) * (x @ up.T)) @ down.T
    assert np.abs(whole - expected).max() < (1e-4 if weights_format == "f32" else 0.05) * np.abs(expected).max()
    first = share(slice(0, 96), partial=True)
    assert np.array_equal(bits(share(slice(96, 130), others=first)), bits(whole))


@pytest.mark.parametrize(("head_dim", "positions", "rows", "window", "causal"), [
    (16, 40, 5, 0, True), (12, 300, 7, 20, True), (64, 600, 3, 0, False), (8, 1, 1, 0, True)])
def test_attention_of_arrays(head_dim, positions, rows, window, causal):
    q, k, v = arrays((rows, 6, head_dim), (positions, 2, head_dim), (positions, 2, head_dim), size=1)
    found = llama_hpc.attention(q, k, v, causal, window)
    last, p = np.arange(positions - rows, positions)[:, None], np.arange(positions)
    visible = (p <= last) & ((p > last - window) | (window == 0)) | (not causal)
    keys, values = (np.repeat(x, 3, axis=1).astype(np.float64) for x in (k, v))
    scores = np.where(visible[:, None], np.einsum("rhd,phd->rhp", q.astype(np.float64), keys) / head_dim**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert np.abs(found - np.einsum("rhp,phd->rhd", weights / weights.sum(-1, keepdims=True), values)).max() < 1e-6
    if causal:
        # Each row alone, as decoding has it.
        for row in range(rows):
            end = positions - rows + row + 1
            alone = llama_hpc.attention(q[row : row + 1], k[:end], v[:end], True, window)
            assert np.array_equal(bits(alone[0]), bits(found[row]))


def test_arrays_that_do_not_fit():
    q, k = arrays((3, 4, 8), (2, 3, 8))
    for arguments, message in (((q, k, k), "a divisor of heads"), ((q, k[:, :2], k[:, :2]), "rows are the last positions"),
                               ((q[:1], k[:, :2], k[:, :2], False, 4), "only causal attention")):
        with pytest.raises(ValueError, match=message):
            llama_hpc.attention(*arguments)
    x, wide = np.zeros((2, 32), np.float32), np.zeros((4, 64), np.float32)
    for call in (lambda: llama_hpc.column_parallel_linear(x, wide), lambda: llama_hpc.mlp_tensor_parallel(x, wide, wide, wide)):
        with pytest.raises(UsageError, match="fit"):
            call()
    with pytest.raises(NumericsError, match="not finite"):
        llama_hpc.row_parallel_linear(np.full((1, 32), np.inf, np.float32), np.ones((4, 32), np.float32))
    with pytest.raises(TypeError, match="not int32"):
        llama_hpc.all_reduce_sum(np.zeros(3, np.int32))
    assert llama_hpc.all_reduce_sum(np.array([2**62], np.int64)).tolist() == [2**62]
