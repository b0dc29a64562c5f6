"""``llama-hpc bench kernels``: tables on the terminal, the same figures as JSON and HDF5, and bits compared before timing."""

import json

import h5py
import numpy as np
import pytest

from llama_hpc.bench import products, schedules
from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.cli.main import main
from llama_hpc.kernels.cpu.calls import matmul, shared_pool
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.kernels.cpu.team import SCHEDULES
from llama_hpc.kernels.cpu.weights import allocate, fill
from llama_hpc.kernels.formats import Blocks

FORMATS = ("q3_5", "q4", "q8", "f16", "f32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("MOST_COPIES", 2), ("PROBE_BYTES", 1 << 16), ("PROBE_SECONDS", 1e-4)):
        monkeypatch.setattr(products, name, value)


def bench(tmp_path, capsys, *options):
    """Lines of the terminal, the JSON file's content, and the HDF5 file's."""
    output = tmp_path / "bench"
    assert main(["bench", "kernels", *options, "--output", str(output)]) == 0
    with h5py.File(output.with_suffix(".h5")) as file:
        tables, attributes = {name: dataset[:] for name, dataset in file.items()}, dict(file.attrs)
    return capsys.readouterr().out.splitlines(), json.loads(output.with_suffix(".json").read_text()), tables, attributes


def test_table_and_files(capsys, tmp_path):
    lines, report, tables, attributes = bench(
        tmp_path, capsys, "--weights", *FORMATS, "--shapes", "64x80", "--tokens", "1", "20", "--threads", "1", "2",
        "--schedules", *SCHEDULES, "--rounds", "1")
    assert lines[0].startswith(f"{kernels()} kernels") and lines[1].split()[:3] == ["weights", "KxN", "tokens"]
    results = report["products"]
    assert len(results) == len(FORMATS) * 2 * 2 * len(SCHEDULES) and len(lines) == 2 + len(results) + 1
    for result in results:
        operations = 2 * result["columns"] * result["rows"] * result["tokens"]
        assert result["operations_per_second"] * result["seconds"] == pytest.approx(operations)
    assert attributes["kernels"] == report["kernels"] == kernels() and attributes["command"] == report["command"]
    assert list(tables) == ["products"] and tables["products"].dtype.names == tuple(results[0])
    for row, result in zip(tables["products"], results, strict=True):
        assert [cell.decode() if isinstance(cell, bytes) else cell for cell in row.tolist()] == list(result.values())


@pytest.mark.parametrize("weights", FORMATS)
def test_comparison_of_schedules(capsys, tmp_path, weights):
    lines, report, tables, _ = bench(tmp_path, capsys, "--compare", "--weights", weights, "--shapes", "2000x400", "--tokens", "1",
                                     "9", "--threads", "1", "3", "--rounds", "2")
    results = report["schedules"]
    assert len(lines) == 2 + len(results) + 1 and len(tables["schedules"]) == len(results)
    assert [r["code"] for r in results] == 2 * ["scalar", "SIMD", *SCHEDULES]
    for result in results:
        assert result["threads"] == (1 if result["code"] in ("scalar", "SIMD") else 3)
        assert (result["speed_up"] == 1) if result["code"] == "scalar" else result["speed_up"] > 0
        assert result["steals"] == 0 or result["code"] == "steal"
    # One range a thread, and several chunks.
    tasks = {r["code"]: r["tasks"] for r in results}
    assert tasks["SIMD"] == 1 and tasks["static"] == 3 and tasks["dynamic"] > 3


def test_schedules_with_other_bits_are_not_timed(monkeypatch):
    bench = products.Products("q8", 64, 48)
    bench.measure(3, shared_pool(1), "static", 1)
    monkeypatch.setattr(products, "activations", lambda tokens, columns: np.ones((tokens, columns), np.float32))
    with pytest.raises(BenchmarkError, match=r"3 tokens with q8 weights 64x48 has other bits with schedule steal on 2 threads"):
        bench.measure(3, shared_pool(2), "steal", 1)


def test_scalar_code_with_other_bits_is_not_timed(monkeypatch):
    comparison = schedules.ScheduleComparison("q8", 64, 48)
    monkeypatch.setattr(schedules.Baseline, "run", lambda self: self.out + np.float32(1))
    with pytest.raises(BenchmarkError, match="scalar: the product with q8 weights 64x48 has other bits"):
        comparison.measure(3, 2, 1)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("columns", [64, 1000])
def test_random_weights_keep_the_size_of_activations(weights, columns):
    random, blocks = RandomWeights(), Blocks(columns, 256)
    filled = allocate(weights, 500, blocks, np.array(RandomWeights().rows("q3_5", 1, blocks).codebook))
    fill(filled, 0, random.rows(weights, 500, blocks))
    x = np.random.default_rng(0).standard_normal((4, columns), np.float32)
    for held in (random.matrix(weights, 500, blocks), filled):
        assert 0.6 < matmul(x, held).std() < 1.6
