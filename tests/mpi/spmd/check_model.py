"""A model cut for the ranks of this job computes the bits of the whole model on one rank."""

from itertools import chain

import numpy as np
import pytest
from check_reduce import MODES
from models import CASES, GridModel, batch_of, factorisations, fits
from mpi4py import MPI

from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.model.steps import Steps
from llama_hpc.weights.checkpoint import open_checkpoint


def grids(comm, folder):
    """(stages, tensor ranks) of every grid of one replica that fits the model."""
    config = open_checkpoint(folder).config
    return [(s.pipeline, s.tensor) for s in factorisations(comm.size) if s.data == 1 and fits(config, s)]


def steps(vocab_size):
    """Two sequences: a prompt in two chunks beside a shorter one, then three tokens one by one."""
    first, second = (np.arange(n) * step % vocab_size for n, step in ((19, 37), (5, 101)))
    yield batch_of([(0, 0, first[:12])])
    yield batch_of([(1, 0, second), (0, 12, first[12:])])
    for i in range(3):
        yield batch_of([(0, 19 + i, np.array([7 * i])), (1, 5 + i, np.array([vocab_size - 1 - i]))])


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize(("name", "weights_format"), CASES)
def test_logits_and_packed_weights_on_every_grid(comm, checkpoints, name, weights_format):
    expected, hashes = None, {}
    if comm.rank == 0:
        alone = GridModel(checkpoints / name, weights_format, MPI.COMM_SELF, 1, 1, sequences=2, hashes=hashes)
        expected = [alone.forward(batch) for batch in steps(alone.config.vocab_size)]
        assert alone.stage.reducer.calls == 0
        assert len(hashes) == 7 * alone.config.num_layers + (1 if alone.config.tie_embeddings else 2)
    expected, hashes = comm.bcast((expected, hashes))
    for pipeline, tensor in grids(comm, checkpoints / name):
        own = {}
        model = GridModel(checkpoints / name, weights_format, comm, pipeline, tensor, sequences=2, hashes=own)
        rows = 0
        for batch, logits in zip(steps(model.config.vocab_size), expected, strict=True):
            found = model.forward(batch)
            rows += batch.rows
            if model.grid.is_leader:
                assert np.array_equal(bits(found), bits(logits)), (pipeline, tensor)
        model.channel.finish()
        # Tied embeddings are hashed on the first stage and on the last.
        assert set(chain(*(part.items() for part in comm.allgather(own)))) == set(hashes.items()), (pipeline, tensor)
        # A step joins the embedding, attention and MLP of every layer, the largest logits, and the sums of their weights.
        stage = model.stage.stage
        reductions = len(expected) * (2 * len(stage.layers) + stage.first + 2 * stage.last)
        assert model.stage.reducer.calls == (reductions if tensor > 1 else 0)
        sent = 4 * (rows * model.config.hidden_size + 2 * len(expected))
        assert model.channel.bytes_sent == (0 if stage.last else sent)


@pytest.mark.parametrize(("weights_format", "spread_from"), [("q8", 0), ("q8", 1), ("q8", 3), ("f32", 1)])
@pytest.mark.parametrize("mode", MODES)
def test_logits_with_every_reducer(comm, checkpoints, mode, weights_format, spread_from):
    """All ranks as one tensor group, to which rows are dealt if ``spread_from`` says so."""
    if comm.size > 4:
        pytest.skip("what there is to see is seen on four ranks")
    expected = None
    if comm.rank == 0:
        alone = GridModel(checkpoints / "deep", weights_format, MPI.COMM_SELF, 1, 1, sequences=2, spread_from=spread_from)
        expected = [alone.forward(batch) for batch in steps(alone.config.vocab_size)]
        assert alone.stage.spread_steps == 0
    expected = comm.bcast(expected)
    model = GridModel(checkpoints / "deep", weights_format, comm, 1, comm.size, sequences=2, reduce=mode, spread_from=spread_from)
    reducer = model.stage.reducer
    assert reducer.mode == (mode if comm.size > 1 else "mpi")
    for batch, logits in zip(steps(model.config.vocab_size), expected, strict=True):
        found = model.forward(batch)
        assert found is None or np.array_equal(bits(found), bits(logits))
    sizes = [batch.rows for batch in steps(model.config.vocab_size)]
    spread = sum(rows >= spread_from for rows in sizes) if spread_from and comm.size > 1 else 0
    assert model.stage.spread_steps == spread and sizes == [12, 12, 2, 2, 2]
    joins = len(expected) * (2 * model.config.num_layers + 3)
    assert spread or reducer.calls == (joins if comm.size > 1 else 0)
    assert (reducer.nanoseconds[0] > 0) == (comm.size > 1)
    comm.Barrier()
    reducer.free()


@pytest.mark.parametrize(("name", "weights_format", "overlap_from"),
                         [("deep", "q8", 1), ("deep", "f32", 5), ("mistral_window", "f32", 2), ("qwen3", "q8", 2)])
@pytest.mark.parametrize("mode", MODES)
def test_logits_with_sums_under_way(comm, checkpoints, mode, name, weights_format, overlap_from):
    """Steps in two halves, whose sums travel in turn: with every reducer but that which has nothing to send."""
    size = min(4, open_checkpoint(checkpoints / name).config.num_heads)
    if comm.size > 4:
        pytest.skip("what there is to see is seen on four ranks")
    group = comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank)
    if group != MPI.COMM_NULL:
        batches, expected = list(steps(100)), None
        if comm.rank == 0:
            alone = GridModel(checkpoints / name, weights_format, MPI.COMM_SELF, 1, 1, sequences=2, overlap_from=overlap_from)
            expected = [alone.forward(batch) for batch in batches]
            assert alone.stage.overlapped_steps == 0
        expected = group.bcast(expected)
        model = GridModel(checkpoints / name, weights_format, group, 1, group.size, sequences=2, reduce=mode,
                          overlap_from=overlap_from)
        reducer, layers = model.stage.reducer, model.config.num_layers
        for batch, logits in zip(batches, expected, strict=True):
            found = model.forward(batch)
            assert found is None or np.array_equal(bits(found), bits(logits))
        travels = group.size > 1 and mode != "shared"
        overlapped = sum(batch.rows >= overlap_from for batch in batches) if travels else 0
        assert model.stage.overlapped_steps == overlapped
        assert reducer.overlapped == overlapped * 4 * layers
        # Two sums of a layer, in halves or whole; the embedding, the largest logits, and the sums of their weights.
        assert reducer.calls == (overlapped * 2 * layers + len(batches) * (2 * layers + 3) if group.size > 1 else 0)
        assert (reducer.nanoseconds[0] > 0) == (group.size > 1)
        group.Barrier()
        reducer.free()


@pytest.mark.parametrize(("name", "weights_format"), [("smollm", "q3_5"), ("llama_odd", "f32"), ("llama_biases", "q8")])
def test_the_parts_of_a_layer(comm, checkpoints, name, weights_format):
    """ParallelAttention and ParallelMLP alone, over all ranks as one tensor group."""
    config = open_checkpoint(checkpoints / name).config
    if comm.size > config.num_heads:
        pytest.skip("more ranks than query heads")
    batch = batch_of([(0, 0, np.arange(11)), (1, 0, np.arange(4))])
    residual = np.random.default_rng(3).standard_normal((batch.rows, config.hidden_size)).astype(np.float32) * np.float32(50)
    def results(comm, tensor):
        stage = GridModel(checkpoints / name, weights_format, comm, 1, tensor, sequences=2).stage
        layer, b = stage.layers[1], stage.buffers
        for calls, part in enumerate((layer.attention, layer.mlp), 1):
            steps = Steps(shared_pool(1), stage.reducer, stage.faults)
            b.add_norm(steps, layer.weights.mlp_norm, b.normed, steps.rows, "mlp_norm", 1)
            part.add(steps, b.normed)
            stage.residual[: batch.rows] = residual
            b.load(batch, steps)
            steps.run()
            assert stage.faults.code == 0
            assert stage.reducer.calls == (calls if tensor > 1 else 0)
            yield stage.residual[: batch.rows].copy()
    expected = comm.bcast(list(results(MPI.COMM_SELF, 1)) if comm.rank == 0 else None)
    for found, alone in zip(results(comm, comm.size), expected, strict=True):
        assert not np.array_equal(alone, residual)
        assert np.array_equal(bits(found), bits(alone))


def test_threads_do_not_matter(comm, checkpoints):
    """Two threads on every rank, against one on one rank."""
    expected = None
    batch = batch_of([(0, 0, np.arange(40))])
    if comm.rank == 0:
        expected = GridModel(checkpoints / "deep", "q8", MPI.COMM_SELF, 1, 1).forward(batch)
    expected = comm.bcast(expected)
    model = GridModel(checkpoints / "deep", "q8", comm, 1, comm.size, threads=2)
    found = model.forward(batch)
    assert found is None or np.array_equal(bits(found), bits(expected))


def test_a_fault_on_one_tensor_rank_reaches_the_leader(comm, checkpoints):
    """A value beyond the range of exact sums, in the vocabulary rows of the last rank only."""
    model = GridModel(checkpoints / "llama_odd", "f32", comm, 1, comm.size)
    if comm.rank == comm.size - 1:
        model.stage.weights.head.weights.data[:] = 1e30
    model.stage.forward(batch_of([(0, 0, np.arange(3))]))
    code = comm.bcast(model.stage.faults.code, comm.size - 1)
    assert code and (model.stage.faults.code == (code if comm.rank == comm.size - 1 else 0))
    assert model.gather.fault() == code
