"""Tensor ranks that deal out the positions of the cache compute the bits of one rank that has them all."""

import numpy as np
import pytest
from check_reduce import MODES
from models import GridModel, batch_of
from mpi4py import MPI

from llama_hpc import LLM, ParallelConfig, SamplingParams
from llama_hpc.errors import UsageError
from llama_hpc.results import digest

LENGTH = 1100                   # of the longer sequence: five blocks


def steps(vocab_size):
    """A long prompt in chunks beside a shorter one, then tokens one by one across the end of a block."""
    first, second = (np.arange(n) * step % vocab_size for n, step in ((1023, 37), (255, 101)))
    yield batch_of([(0, 0, first[:600])])
    yield batch_of([(1, 0, second), (0, 600, first[600:700])])
    yield batch_of([(0, 700, first[700:])])
    for i in range(2):
        yield batch_of([(0, 1023 + i, np.array([7 * i])), (1, 255 + i, np.array([vocab_size - 1 - i]))])


def bits(logits):
    return np.ascontiguousarray(logits).view(np.uint32)


def model_on(comm, folder, tensor, **how):
    return GridModel(folder, "q8", comm, 1, tensor, sequences=2, max_rows=600, max_seq_len=LENGTH, **how)


@pytest.mark.parametrize("mode", MODES)
def test_logits_with_every_reducer(comm, checkpoints, mode):
    """Every number of groups; the first sequence begins on a rank other than the first."""
    if comm.size > (6 if mode == "shared" else 4):
        pytest.skip("slow on few cores, and one reducer is enough")
    found = []
    if comm.rank == 0:
        alone = model_on(MPI.COMM_SELF, checkpoints / "smollm", 1)
        found = [alone.forward(batch) for batch in steps(alone.config.vocab_size)]
    expected = comm.bcast(found)
    for context in (n for n in range(2, comm.size + 1) if comm.size % n == 0):
        model = model_on(comm, checkpoints / "smollm", comm.size, context=context, reduce=mode)
        stage = model.stage
        stage.cache.first_parts[:] = context - 1, 0
        for batch, logits in zip(steps(model.config.vocab_size), expected, strict=True):
            own = model.forward(batch)
            assert own is None or np.array_equal(bits(own), bits(logits)), context
        model.channel.finish()
        work = stage.work()
        assert work["context_parallel"] == context and work["context_seconds"] > 0
        # Queries, maxima and sums; so many float32 and int64 a row and query head of the group.
        rows, layers = sum(batch.rows for batch in steps(400)), len(stage.stage.layers)
        assert work["context_joins"] == 3 * layers * len(expected)
        each = len(stage.share.group_heads) * (4 * 8 + 8 + 8 * 9)
        assert work["context_bytes"] == rows * layers * each
        # Of five blocks; all ranks of a group have the KV heads of the group.
        blocks = -(-5 // context)
        assert stage.cache.own_count <= 2 * 16 * blocks
        comm.Barrier()
        stage.free()


def test_from_python(comm, checkpoints):
    """Answers, scores and logits of texts of several blocks."""
    if comm.size == 1 or comm.size > 4:
        pytest.skip("some sizes are enough")
    rng = np.random.default_rng(3)
    prompts, ids = [rng.integers(0, 515, n).tolist() for n in (600, 40, 300)], rng.integers(0, 515, 700).tolist()
    params = [SamplingParams(max_tokens=5, ignore_eos=True), SamplingParams(temperature=1.0, n=2, max_tokens=4),
              SamplingParams(max_tokens=3, logprobs=2)]
    def results(llm):
        state = llm.state(900)
        found = [digest(list("012"), llm.generate(prompts, params)), llm.score([ids])[0].logprobs.tobytes(),
                 llm.forward(ids).tobytes(), np.concatenate([state.forward(ids[:300]), state.forward(ids[300:])]).tobytes()]
        state.close()
        return found
    expected = None
    if comm.rank == 0:
        with LLM(checkpoints / "deep", threads=1, comm=MPI.COMM_SELF) as llm:
            expected = results(llm)
    with LLM(checkpoints / "deep", ParallelConfig.tensor_parallel(), threads=1, context_parallel=comm.size) as llm:
        assert results(llm) == comm.bcast(expected)


def test_what_cannot_be(comm, checkpoints):
    with pytest.raises(UsageError, match="context_parallel must be a whole number of at least 1, got 0"):
        LLM(checkpoints / "deep", ParallelConfig.tensor_parallel(), threads=1, context_parallel=0)
    with pytest.raises(UsageError, match="--context-parallel"):
        LLM(checkpoints / "deep", ParallelConfig.tensor_parallel(), threads=1, context_parallel=comm.size + 1)
