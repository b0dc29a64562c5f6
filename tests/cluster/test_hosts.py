"""Several hosts without a scheduler: mpirun gets in by ssh, and each host has a network, a name and a /dev/shm of its own."""

import json
import subprocess
import sys
from pathlib import Path

import mpi_jobs
import pytest
from slurm_cluster import wait
from workload import JOBS, kept

from llama_hpc.results import read_results

FAILING = mpi_jobs.ROOT / "tests/cli/failing_rank.py"
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


@pytest.mark.parametrize("grid, spares, slots, lost", [("1x2x1", 1, 1, 1), ("2x1x2", 0, 2, 0)])
def test_ranks_of_another_host_go_on(hosts, ssh_environment, work, tmp_path, grid, spares, slots, lost):
    """A stage that dies is replaced by a spare on a third host; half of a replica that dies leaves the one on the other host."""
    output, prompts, listed = tmp_path / "out.h5", tmp_path / "prompts.jsonl", tmp_path / "hosts"
    work.write_prompts(prompts)
    listed.write_text("".join(f"n{i} slots={slots}\n" for i in (1, 2, 3)))
    launcher = [Path(sys.executable).parent / "mpirun", "--with-ft", "ulfm", "--hostfile", listed, "-n", 4 if slots == 2 else 3]
    hosts["login"].run(*launcher, sys.executable, FAILING, "killed later", lost, "run", work.model, "--prompts", prompts,
                       "--output", output, "--grid", grid, "--spares", spares, *work.options, env=ssh_environment, timeout=300)
    facts = work.check(output)
    assert facts["incidents"]["ranks_lost"] == 1


def test_the_script_for_hosts_that_may_lose_ranks(hosts, ssh_environment, work, tmp_path):
    output, prompts, listed = tmp_path / "out.h5", tmp_path / "prompts.jsonl", tmp_path / "hosts"
    work.write_prompts(prompts, pace=0.05)
    listed.write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    settings = {"HOSTS": str(listed), "RANKS": "3", "SPARES": "1", "GRID": "2x1x1"}
    script = hosts["login"].popen("bash", JOBS / "fault-tolerant.sh", *work.options, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env=ssh_environment | settings | work.environment(prompts, output))
    wait(lambda: kept(output) >= 5)
    hosts["n2"].run("pkill", "-KILL", "-f", "llama-hpc run")
    said, _ = script.communicate(timeout=300)
    assert script.returncode == 0, said
    assert work.check(output)["incidents"]["ranks_lost"] == 1
