"""The recommended command lines: what they ask for, and where Open MPI's own mapper puts the ranks of such a node."""

import os
import re
import shutil
import subprocess

import pytest
from node_tree import write_node

from llama_hpc.runtime.advice import launch_advice

EPYC = {"sockets": 2, "nodes": 2, "cores": 8, "smt": 2, "l3_cores": 4}
PLAIN = {"sockets": 1, "nodes": 1, "cores": 6}
DUAL = {"sockets": 2, "nodes": 1, "cores": 4}


def advice(tmp_path, shape, cpus=None, cores=None):
    total = shape["sockets"] * shape["nodes"] * shape["cores"]
    cpus = set(range(total * shape.get("smt", 1))) if cpus is None else cpus
    return launch_advice(cpus, total if cores is None else cores, write_node(tmp_path, **shape))


def test_a_rank_for_every_numa_domain_or_cache(tmp_path):
    large, small = advice(tmp_path, EPYC)
    assert (large.purpose, large.ranks, large.threads) == ("one rank a NUMA domain, for large models", 4, 8)
    assert (small.purpose, small.ranks, small.threads) == ("one rank an L3 cache, for small models", 8, 4)
    assert large.commands == {
        "Open MPI": "mpirun -n 4 --map-by ppr:1:numa:PE=8 --bind-to core llama-hpc run …",
        "MPICH": "mpiexec -n 4 -bind-to core:8 llama-hpc run …",
        "sbatch": "#SBATCH --ntasks-per-node=4 --cpus-per-task=8 --threads-per-core=1, then export SRUN_CPUS_PER_TASK=8",
        "srun": "srun -n 4 --cpus-per-task=8 --threads-per-core=1 --cpu-bind=cores --distribution=block:block --mpi=pmix "
                "llama-hpc run …",
    }


def test_one_rank_where_nothing_divides_the_cores(tmp_path):
    (one,) = advice(tmp_path, PLAIN)
    assert (one.purpose, one.ranks, one.threads) == ("one rank", 1, 6)
    assert one.commands["srun"].startswith("srun -n 1 --cpus-per-task=6 --cpu-bind=cores ")


@pytest.mark.parametrize(("cpus", "cores", "shape"), [
    (range(6), 6, (1, 6)),              # four cores of one socket, two of the other
    (range(8), 3, (1, 3)),              # a quota
    ((0, 1, 4, 5), 4, (2, 2)),          # two cores of each
    (range(4), 4, (1, 4)),              # one socket of two
])
def test_a_job_with_a_part_of_the_node(tmp_path, cpus, cores, shape):
    assert [(a.ranks, a.threads) for a in advice(tmp_path, DUAL, set(cpus), cores)] == [shape]


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")
@pytest.mark.parametrize("shape", [EPYC, PLAIN, DUAL, {"sockets": 1, "nodes": 1, "cores": 16, "l3_cores": 8}])
def test_open_mpi_binds_ranks_as_recommended(tmp_path, shape):
    """Its mapper, launching nothing, on a made-up topology: rank r gets the r-th run of cores."""
    behind_l3 = shape.get("l3_cores", shape["cores"])
    tree = f"Package:{shape['sockets']} NUMANode:{shape['nodes']} L3Cache:{shape['cores'] // behind_l3} " \
           f"Core:{behind_l3} PU:{shape.get('smt', 1)}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PRTE_", "SLURM_"))} | {
        "HWLOC_SYNTHETIC": tree, "HWLOC_THISSYSTEM": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if "Open MPI" not in subprocess.run(["mpirun", "--version"], capture_output=True, text=True, env=environment).stdout:
        pytest.skip("mpirun is not Open MPI's")
    for layout in advice(tmp_path, shape):
        flags = layout.commands["Open MPI"].split()[1:-3]
        job = subprocess.run(["mpirun", *flags, "--display", "map", "--runtime-options", "donotlaunch", "true"],
                             capture_output=True, text=True, env=environment, timeout=60)
        bound = [cores(text) for text in re.findall(r"Binding: (package.*)", job.stdout)]
        assert bound == [list(range(r * layout.threads, (r + 1) * layout.threads)) for r in range(layout.ranks)], job.stderr


def cores(text):
    """``package[0][core:L0-7]`` as a list of numbers."""
    first, _, last = re.search(r"core:L([\d-]+)", text)[1].partition("-")
    return list(range(int(first), int(last or first) + 1))


def test_no_rank_across_sockets_is_bound_by_open_mpi(tmp_path):
    """It refuses to: a job that has unequal parts of two sockets runs unbound there."""
    (one,) = advice(tmp_path, DUAL, set(range(6)), 6)
    assert one.commands["Open MPI"] == "mpirun -n 1 --map-by node --bind-to none llama-hpc run …"
