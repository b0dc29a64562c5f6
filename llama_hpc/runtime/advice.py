"""How to start ranks on a node like this one: the flags of mpirun, mpiexec and srun. No MPI.

Sources: mpirun(1) of Open MPI 5 (PRRTE's mapping and binding), `mpiexec -bind-to -help` of MPICH's Hydra, srun(1).
"""

from pathlib import Path
from typing import NamedTuple

from llama_hpc.kernels.cpu.places import ROOT, cache_sizes, domains, physical_cores


class Advice(NamedTuple):
    """Ranks on each node, threads (cores) of each, and by launcher the command that binds them so."""

    purpose: str
    ranks: int
    threads: int
    commands: dict[str, str]


def launch_advice(cpus: set[int], cores: int, root: Path = ROOT) -> list[Advice]:
    """One or two good layouts for a job that may use the logical ``cpus`` of each node, and at most ``cores`` cores of them.

    First one rank a NUMA domain (or a socket, or one in all), so that its weights lie in memory that is near its threads;
    then one rank an L3 cache where these are smaller and wholly the job's, for models so small that threads which wait for
    each other cost more than copies of the weights. Ranks have equal numbers of cores: domains of which the job has unequal
    parts are not used.
    """
    hardware_threads = len(cpus) > physical_cores(cpus, root)
    # Open MPI binds no rank to the cores of two sockets.
    whole = "node" if len(domains("sockets", cpus, root)) == 1 else "sockets"
    near_memory = ("one rank", whole, [min(cores, physical_cores(cpus, root))])
    if cores < physical_cores(cpus, root):
        return [_advice(*near_memory, hardware_threads)]
    for kind, name, level in (("numa_domains", "NUMA domain", "numa"), ("sockets", "socket", "package")):
        parts = [physical_cores(part, root) for part in domains(kind, cpus, root)]
        if len(parts) > 1 and len(set(parts)) == 1:
            near_memory = (f"one rank a {name}", level, parts)
            break
    caches = [physical_cores(part, root) for part in domains("ll_caches", cpus, root)]
    if len(caches) > len(near_memory[2]) and set(caches) == {cache_sizes(root, min(cpus)).l3_cores} != {1}:
        purpose, *where = near_memory
        return [_advice(f"{purpose}, for large models", *where, hardware_threads),
                _advice("one rank an L3 cache, for small models", "l3cache", caches, hardware_threads)]
    return [_advice(*near_memory, hardware_threads)]


def _advice(purpose: str, level: str, parts: list[int], hardware_threads: bool) -> Advice:
    """``parts`` are the cores of each rank, all equal; ``level`` is Open MPI's name of what a rank gets, or ``sockets``."""
    ranks, threads = len(parts), parts[0]
    # ppr:1:node cannot be had with PE=; by node means the same.
    mapping = {"sockets": "--map-by node --bind-to none", "node": f"--map-by node:PE={threads} --bind-to core"}.get(
        level, f"--map-by ppr:1:{level}:PE={threads} --bind-to core")
    # SLURM's CPUs may be hardware threads; and it would deal consecutive ranks out over the sockets.
    only_cores = " --threads-per-core=1" if hardware_threads else ""
    program = "llama-hpc run …"
    return Advice(purpose, ranks, threads, {
        "Open MPI": f"mpirun -n {ranks} {mapping} {program}",
        "MPICH": f"mpiexec -n {ranks} -bind-to core:{threads} {program}",
        "sbatch": f"#SBATCH --ntasks-per-node={ranks} --cpus-per-task={threads}{only_cores}, then "
                  f"export SRUN_CPUS_PER_TASK={threads}",
        "srun": f"srun -n {ranks} --cpus-per-task={threads}{only_cores} --cpu-bind=cores --distribution=block:block "
                f"--mpi=pmix {program}",
    })
