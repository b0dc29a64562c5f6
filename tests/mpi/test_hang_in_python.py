"""A hang in a call of the Python API, and a rank that does not come to one."""

import mpi_jobs
import pytest
from reference_models import write_checkpoint

PROGRAM = """
import sys, time
from llama_hpc import LLM, ParallelConfig, SamplingParams
from mpi4py import MPI
llm = LLM(sys.argv[1], ParallelConfig(tensor=2), hang_limit=1.5)
prompts, params = [[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True)
assert len(llm.generate(prompts, params)) == 1
if MPI.COMM_WORLD.rank == 1 and sys.argv[2] == "hangs":
    from llama_hpc.model.transformer import TransformerStage
    TransformerStage.forward = lambda stage, batch: time.sleep(60)
if MPI.COMM_WORLD.rank == 1 and sys.argv[2] == "late":
    time.sleep(4.5)
assert len(llm.generate(prompts, params)) == 1
llm.close()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint("llama_odd", tmp_path_factory.mktemp("model") / "model")


def test_a_hang_in_a_call_is_named(model, tmp_path):
    job = mpi_jobs.mpirun(2, ["-c", PROGRAM, model, "hangs"], cwd=tmp_path)
    (line,) = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert job.returncode == 1 and "error: no progress for 1.5 s (the hang limit): rank 0: step " in line
    assert "rank 1: step 1, compute" in line and f"stacks in {tmp_path}/llama-hpc.hang/hang-*.txt" in line
    assert "in <lambda>" in (tmp_path / "llama-hpc.hang/hang-1.txt").read_text()


def test_a_rank_that_is_late_is_waited_for(model, tmp_path):
    job = mpi_jobs.mpirun(2, ["-c", PROGRAM, model, "late"], cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert "rank 0 waits: rank 1: in the script, outside of calls" in job.stderr
    assert list(tmp_path.iterdir()) == []
