"""Several hosts without a scheduler: mpirun gets in by ssh, and each host has a network, a name and a /dev/shm of its own."""

import json
import sys
from pathlib import Path

import mpi_jobs
import pytest

from llama_hpc.results import read_results

GRIDS = ("2x1x1", "1x2x1", "1x1x2")


@pytest.fixture(scope="module")
def outputs(hosts, ssh_environment, work, tmp_path_factory):
    """Outputs of one job of two hosts, by grid."""
    folder = tmp_path_factory.mktemp("outputs")
    outputs, prompts = {grid: folder / f"{grid}.h5" for grid in GRIDS}, folder / "prompts.jsonl"
    work.write_prompts(prompts)
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (folder / "lines.json").write_text(json.dumps([
        ["run", str(work.model), "--prompts", str(prompts), "--output", str(output), "--grid", grid, *work.options]
        for grid, output in outputs.items()]))
    hosts["login"].run(Path(sys.executable).parent / "mpirun", "--hostfile", folder / "hosts", "-n", 2, sys.executable, "-c",
                       mpi_jobs.TOGETHER, folder / "lines.json", env=ssh_environment, timeout=300)
    return outputs


def test_two_hosts_give_the_answers_of_one(outputs, work):
    """Replicas share prompts and progress over the network, stages activations, tensor ranks sums."""
    for grid, output in outputs.items():
        facts = work.check(output)
        assert facts["hosts"] == ["n1", "n2"] and [rank["host"] for rank in facts["rank_table"]] == ["n1", "n2"], grid


def test_how_hosts_worked_together(outputs):
    with read_results(outputs["2x1x1"]) as results:
        shares = [rank["answers"] for rank in results.provenance["rank_table"]]
        assert min(shares) > 0 and sum(shares) == results.num_outputs, "one counter for both hosts"
    with read_results(outputs["1x1x2"]) as results:
        ranks = results.provenance["rank_table"]
        assert {rank["reduce"] for rank in ranks} == {"mpi"} and min(rank["reductions"] for rank in ranks) > 0
    with read_results(outputs["1x2x1"]) as results:
        assert results.provenance["rank_table"][0]["bytes_sent"] > 0
