"""Jobs on GPUs, emulated ones: on every grid, mixed with CPUs, and without MPI, the digest of a job on CPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_device import missing
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results, read_scores

FOLDER = Path(__file__).parent
# What is absent on a machine with nothing but CuPy and NumPy.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite", "mpi4py", "h5py"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    return write_checkpoint("llama_odd", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path, ids = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [int(i) for i in prompt("llama_odd")]
    path.write_text("".join(json.dumps({"id": f"p{i}", "token_ids": ids[i : i + 3 + i]}) + "\n" for i in range(4)))
    return path


def arguments(model, prompts, output, *options):
    return ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos", "--max-tokens", 5, "--weights", "q8",
            *options]


@pytest.fixture(scope="module")
def on_cpu(command, model, prompts, tmp_path_factory):
    """The digest of a job on CPUs."""
    output = tmp_path_factory.mktemp("cpu") / "out.h5"
    job = command(1, arguments(model, prompts, output, "--device", "cpu"))
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        return results.digest


@pytest.mark.parametrize("gpus,grid", [("0", "1x1x1"), ("0,1", "1x1x2"), ("0,1", "1x2x1"), ("1", "2x1x1")])
def test_any_ranks_may_be_gpus(mpirun, model, prompts, on_cpu, tmp_path, gpus, grid):
    ranks = eval(grid.replace("x", "*"))
    job = mpirun(ranks, [FOLDER / "emulated_run.py", gpus, *arguments(model, prompts, tmp_path / "out.h5", "--grid", grid)])
    assert job.returncode == 0, job.stderr
    with read_results(tmp_path / "out.h5") as results:
        assert results.digest == on_cpu
        ranks = results.provenance["rank_table"]
        assert {i for i, rank in enumerate(ranks) if rank["device"].startswith("gpu")} == {int(i) for i in gpus.split(",")}
        for i in map(int, gpus.split(",")):
            assert ranks[i]["replayed_steps"] > 0
            assert (ranks[i]["reductions"] > 0 and ranks[i]["reduce"] == "staged") == (grid == "1x1x2")
            # In a pipeline the next step is launched while one is computed.
            assert (ranks[i]["steps_beside"] > 0) == (grid == "1x2x1")
        assert [rank["layers"] for rank in ranks] == ([2, 2] if grid == "1x2x1" else [4] * len(ranks))
    assert "layers by" not in job.stderr


@pytest.mark.parametrize("gpu,made_up,layers", [(0, None, [1, 3]), (1, "0.001,0.01", [1, 3])])
def test_stages_of_unlike_devices_get_layers_by_speed(mpirun, model, prompts, on_cpu, tmp_path, gpu, made_up, layers):
    """Measured, where an emulated GPU is far behind; or made up, where it is ahead."""
    argv = arguments(model, prompts, tmp_path / "out.h5", "--grid", "1x2x1")
    job = mpirun(2, [FOLDER / "emulated_run.py", gpu, *argv], env={"LAYER_SECONDS": made_up})
    assert job.returncode == 0, job.stderr
    line = next(line for line in job.stderr.splitlines() if "layers by measured speed" in line)
    assert f"stage {gpu} (emulated) " in line and f"stage {1 - gpu} (CPU) " in line
    assert made_up is None or "stage 0 (CPU) 10 ms a layer: 1; stage 1 (emulated) 1 ms a layer: 3" in line
    with read_results(tmp_path / "out.h5") as results:
        assert results.digest == on_cpu
        ranks = results.provenance["rank_table"]
        assert [rank["layers"] for rank in ranks] == layers and ranks[gpu]["replayed_steps"] > 0


def test_scores_on_gpus(command, mpirun, model, tmp_path):
    """Log-probabilities are looked up where the logits are."""
    documents, ids = tmp_path / "documents.jsonl", [int(i) for i in prompt("llama_odd")]
    documents.write_text("".join(json.dumps({"id": f"d{i}", "token_ids": ids[i:] * 3}) + "\n" for i in range(6)))
    digests = []
    for name, job, ranks, first in (("cpu", command, 1, []), ("gpu", mpirun, 2, [FOLDER / "emulated_run.py", "0,1"])):
        output = tmp_path / f"{name}.h5"
        found = job(ranks, [*first, "score", model, "--texts", documents, "--output", output, "--weights", "q8", "--window",
                            16, "--token-budget", 24, *(["--grid", "1x2x1"] if first else [])])
        assert found.returncode == 0, found.stderr
        with read_scores(output) as results:
            digests.append(results.digest)
            ranks = results.provenance["rank_table"]
    assert digests[0] == digests[1] and all(rank["steps_beside"] > 0 for rank in ranks)


def test_tokens_are_chosen_on_the_device(command, mpirun, model, prompts, tmp_path):
    """With every setting that counts, at once; the likeliest tokens are for the host."""
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    settings = ({"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}, {"min_tokens": 4},
                {"temperature": 1.5, "presence_penalty": 0.5, "logit_bias": {"7": 5.0, "9": -1.0}},
                {"temperature": 0.7, "logprobs": 2})
    mixed = tmp_path / "mixed.jsonl"
    lines = [line | {"sampling": chosen} for line, chosen in zip(lines, settings, strict=True)]
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    digests = []
    for name, job in (("cpu", command), ("gpu", mpirun)):
        argv = arguments(model, mixed, tmp_path / f"{name}.h5")
        found = job(1, argv if name == "cpu" else [FOLDER / "emulated_run.py", "0", *argv])
        assert found.returncode == 0, found.stderr
        with read_results(tmp_path / f"{name}.h5") as results:
            digests.append(results.digest)
    with read_results(tmp_path / "gpu.h5") as results:
        assert digests[0] == digests[1] and results.provenance["rank_table"][0]["device_draws"] == 14


def test_tensor_ranks_of_one_group_are_of_one_kind(mpirun, model, prompts, on_cpu, tmp_path):
    argv = arguments(model, prompts, tmp_path / "out.h5", "--grid", "1x1x2")
    job = mpirun(2, [FOLDER / "emulated_run.py", "1", *argv])
    assert job.returncode == 0 and "some ranks that have a GPU compute on the CPU: of tensor ranks" in job.stderr, job.stderr
    with read_results(tmp_path / "out.h5") as results:
        assert results.digest == on_cpu


def test_without_mpi_numba_and_hdf5(model, prompts, on_cpu):
    job = subprocess.run([sys.executable, "-c", BLOCK, FOLDER / "standalone.py", model, "--weights", "q8", "--prompts", prompts,
                          "--max-tokens", "5", "--emulated"], capture_output=True, text=True, check=False, timeout=120)
    assert job.stdout.strip() == on_cpu, job.stderr
