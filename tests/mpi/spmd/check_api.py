"""The Python API on the ranks of this job: the same answers, scores and logits on every layout."""

import numpy as np
import pytest
from mpi4py import MPI

from llama_hpc import (
    LLM,
    ParallelConfig,
    SamplingParams,
    TensorParallelConfig,
    TensorParallelStrategy,
    all_reduce_sum,
    column_parallel_linear,
    mlp_tensor_parallel,
    row_parallel_linear,
)
from llama_hpc.errors import NumericsError
from llama_hpc.results import digest

PROMPTS = [[1, 2, 3], list(range(40)), [7], [500, 4]]
PARAMS = [SamplingParams(max_tokens=4, ignore_eos=True), SamplingParams(max_tokens=2),
          SamplingParams(temperature=1.3, seed=4, n=2, max_tokens=3), SamplingParams(max_tokens=2, logprobs=2)]  # fmt: skip


def results(llm):
    """Digests of two calls, scores, and logits of two ways."""
    ids, state = list(range(30, 60)), llm.state(64)
    found = [digest(list("0123"), llm.generate(PROMPTS, PARAMS))]
    found += [score.logprobs.tobytes() for score in llm.score([list(range(20)), [3, 4]], window=12)]
    found += [llm.forward(ids).tobytes(), np.concatenate([state.forward(ids[:20]), state.forward(ids[20:])]).tobytes()]
    found += [digest(list("0123"), llm.generate(PROMPTS, PARAMS))]
    state.close()
    return found


@pytest.fixture
def expected(comm, checkpoints):
    """What one rank alone finds."""
    found = None
    if comm.rank == 0:
        with LLM(checkpoints / "deep", threads=1, comm=MPI.COMM_SELF) as llm:
            found = results(llm)
        assert found[0] == found[-1] and found[3] == found[4]
    return comm.bcast(found)


def layouts(size):
    """Of every kind one."""
    yield ParallelConfig()
    if size > 1:
        yield ParallelConfig.pipeline(3)
    if size % 2 == 0 and size > 2:
        yield ParallelConfig(data=2, pipeline=size // 4, tensor=2) if size % 4 == 0 else ParallelConfig(data=2, tensor=size // 2)


def test_the_same_on_every_layout(comm, checkpoints, expected):
    for parallel in layouts(comm.size):
        with LLM(checkpoints / "deep", parallel, threads=1) as llm:
            assert results(llm) == expected, llm.grid.shape


def test_two_models_side_by_side(comm, checkpoints, expected):
    """Each on the ranks of a communicator of its own."""
    half = comm.Split(comm.rank % 2, comm.rank)
    with LLM(checkpoints / "deep", ParallelConfig.tensor_parallel(half.size), threads=1, comm=half) as llm:
        assert results(llm) == expected
    comm.Barrier()
    half.Free()


def test_products_of_arrays(comm):
    """Every rank's share, and all of them, against one rank with everything."""
    rng = np.random.default_rng(0)
    x, w, gate, up, bias = ((rng.standard_normal(shape) * 0.05).astype(np.float32)
                            for shape in ((3, 700), (50, 700), (700, 700), (700, 700), 50))
    own = TensorParallelConfig(comm.size, comm.rank)
    rows, _ = TensorParallelStrategy.COLUMN.share(*w.shape, own)
    _, columns = TensorParallelStrategy.ROW.share(*w.shape, own, block=256)
    whole = column_parallel_linear(x, w, bias)
    assert np.array_equal(column_parallel_linear(x, w[rows], bias[rows], comm), whole[:, rows])
    assert np.array_equal(column_parallel_linear(x, w[rows], bias[rows], comm, gather=True), whole)
    assert np.array_equal(row_parallel_linear(x[:, columns], w[:, columns], bias, comm), whole)
    assert np.array_equal(mlp_tensor_parallel(x, gate[columns], up[columns], w[:, columns], comm),
                          mlp_tensor_parallel(x, gate, up, w))


def test_sums_of_arrays(comm):
    sums = np.array([2**40 + comm.rank, -comm.rank], np.int64)
    ranks = sum(range(comm.size))
    assert all_reduce_sum(sums, comm, out=sums) is sums
    assert sums.tolist() == [2**40 * comm.size + ranks, -ranks]
    assert all_reduce_sum(np.array([0.25 * comm.rank], np.float32), comm).tolist() == [0.25 * ranks]


def test_a_fault_on_one_rank_is_an_error_on_all(comm):
    x = np.full((1, 32), np.nan if comm.rank == comm.size - 1 else 1, np.float32)
    for call in (lambda: row_parallel_linear(x, np.ones((4, 32), np.float32), comm=comm), lambda: all_reduce_sum(x, comm)):
        with pytest.raises(NumericsError, match="not finite"):
            call()
