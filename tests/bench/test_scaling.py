"""``llama-hpc bench scaling``: strategies against one rank, whose bits all of them must give."""

import json

import h5py
import numpy as np
import pytest

from llama_hpc.bench.scaling import rank_counts
from llama_hpc.bench.strategies import Matrix
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.kernels.formats import Blocks, concatenate

STRATEGIES = ("data", "model", "tensor")
QUICK = ["--copies", "2", "--rounds", "2"]
# One rank's weights differ from the others' in a bit.
BROKEN = """
import sys
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.bench.strategies import Matrix
from llama_hpc.cli.main import main
from llama_hpc.runtime.launch import environment_rank
held = Matrix.held
def broken(self, rows, columns, copies):
    found = held(self, rows, columns, copies)
    if environment_rank() == 1 and len(rows) > 32:
        found[-1].row_scales[:] *= 2
    return found
Matrix.held = broken
sys.exit(main(["bench", "scaling", "--shape", "64x96", "--batches", "4", "--strategies", "STRATEGY", "--copies", "2",
               "--rounds", "1"]))
"""


def bench(command, folder, ranks, *options):
    """Lines of the terminal, the JSON file's content, and the HDF5 file's rows."""
    job = command(ranks, ["bench", "scaling", *QUICK, *options], timeout=180, cwd=folder)
    assert job.returncode == 0, job.stderr
    with h5py.File(folder / "benchmark_parallel_results.h5") as file:
        assert list(file) == ["scaling"]
        rows = file["scaling"][:]
    return job.stdout.splitlines(), json.loads((folder / "benchmark_parallel_results.json").read_text()), rows


def test_numbers_of_ranks():
    assert [rank_counts(ranks) for ranks in (1, 2, 3, 5, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 8]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("weak", [False, True])
def test_table_and_files(command, tmp_path, ranks, weak):
    # With five ranks some have no rows of the batch, no panel of outputs, or no block of inputs.
    lines, report, rows = bench(command, tmp_path, ranks, "--shape", "96x100", "--batches", "1", "3", *["--weak"] * weak)
    results = report["scaling"]
    assert lines[-2] == "all strategies gave the bits of the product on one rank"
    assert lines[0].startswith(f"{ranks} rank") and lines[1].startswith("96x100 q3_5, 2 copies; threads of a rank: 1; batch of ")
    assert len(lines) == 3 + len(results) + 2 and (report["ranks"], report["threads"]) == (ranks, 1)
    found = [(r["ranks"], r["strategy"], r["batch"]) for r in results]
    assert found == [(n, name, batch * n if weak else batch)
                     for n in rank_counts(ranks) for name in STRATEGIES for batch in (1, 3)]
    alone = {r["batch"]: r["rows_per_second"] for r in results if r["ranks"] == 1}
    for result in results:
        n, batch = result["ranks"], result["batch"]
        assert result["seconds"] > 0 and result["rows_per_second"] == pytest.approx(batch / result["seconds"])
        assert result["speed_up"] == pytest.approx(result["rows_per_second"] / alone[batch // n if weak else batch])
        assert result["efficiency"] == pytest.approx(result["speed_up"] / n)
        if result["strategy"] == "data" or n == 1:
            assert result["communication_share"] == 0
        else:
            assert 0 < result["communication_share"] <= 1
        assert (result["scaling"], result["nodes"], result["copies"]) == ("weak" if weak else "strong", 1, 2)
    assert rows.dtype.names == tuple(results[0]) and rows["seconds"].tolist() == [r["seconds"] for r in results]


@pytest.mark.parametrize("weights", ["q4", "q8", "f16", "f32"])
def test_formats(command, tmp_path, weights):
    _, report, _ = bench(command, tmp_path, 3, "--shape", "1000x200", "--batches", "2", "--weights", weights, "--threads", "2")
    assert len(report["scaling"]) == 9 and {r["weights"] for r in report["scaling"]} == {weights} and report["threads"] == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_bits_are_not_timed(mpirun, tmp_path, strategy):
    job = mpirun(3, ["-c", BROKEN.replace("STRATEGY", strategy)], timeout=120, cwd=tmp_path)
    assert job.returncode == 1
    lines = [line for line in job.stderr.splitlines() if line.startswith("llama-hpc:")]
    assert len(lines) == 1 and f"{strategy} on 2 ranks, batch 4: the product" in lines[0] and "other bits" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["q3_5", "q8", "f32"])
def test_shares_make_up_the_matrix(weights):
    blocks = Blocks(500, 32)
    plain = RandomWeights().rows(weights, 100, blocks)
    matrix = Matrix(weights, plain, blocks)
    rows = [matrix.row_share(5, rank) for rank in range(5)]
    columns = [matrix.column_share(5, rank) for rank in range(5)]
    for shares, total in ((rows, 100), (columns, 500)):
        assert [k for share in shares for k in share] == list(range(total))
    parts = [matrix.part(range(100), share) for share in columns]
    if weights == "f32":
        np.testing.assert_array_equal(np.concatenate(parts, 1), plain)
    else:
        assert concatenate(parts, 1).bytes() == plain.bytes()
