"""The chosen set of CPU kernels gives the same answers, and the result file says which one ran."""

import json
import os

import pytest
from reference_models import write_checkpoint

from llama_hpc.kernels.cpu.target import KERNELS, kernels
from llama_hpc.results import read_results

BARE = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint("smollm", tmp_path_factory.mktemp("model"))


def run(mpirun, model, folder, weights, env):
    prompts, output = folder / "prompts.jsonl", folder / "out.h5"
    lines = [{"token_ids": list(range(3, 40))}, {"token_ids": [5, 6], "temperature": 0.8}, {"token_ids": [9]}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = mpirun(1, ["-m", "llama_hpc", "run", model, "--prompts", prompts, "--output", output, "--weights", weights,
                      "--max-tokens", "6", "--overwrite"], env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    with read_results(output) as results:
        return results.digest, results.provenance["kernels"]


def test_kernels_change_nothing(mpirun, model, tmp_path):
    """The best that this processor has, and those that run anywhere; the tests of kernels compare what lies between."""
    digests = set()
    for name in (kernels(), KERNELS[-1]):
        digest, used = run(mpirun, model, tmp_path, "q3_5", {"LLAMA_HPC_KERNELS": name})
        assert used == [name]
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="not an x86-64 processor")
def test_a_processor_without_vector_extensions_answers_the_same(mpirun, model, tmp_path):
    digest, used = run(mpirun, model, tmp_path, "q8", BARE)
    assert used == ["generic"]
    assert digest == run(mpirun, model, tmp_path, "q8", {})[0]


def test_kernels_that_the_processor_lacks_are_refused(mpirun, model, tmp_path):
    for env in ({"LLAMA_HPC_KERNELS": "fast"}, BARE | {"LLAMA_HPC_KERNELS": "vbmi"}):
        done = mpirun(3, ["-m", "llama_hpc", "run", model, "--prompts", "p.jsonl", "--output", tmp_path / "o.h5"], env=env)
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if line.startswith("llama-hpc:")]
        assert len(lines) == 1 and "LLAMA_HPC_KERNELS" in lines[0]
