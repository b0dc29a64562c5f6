"""Where the ranks of a job run: the table at its start, and what is wrong with how they were started."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_hpc.kernels.cpu.places import ROOT, cores_of, cpu_text, numa_nodes
from llama_hpc.runtime.devices import CPU, Choice, devices_text
from llama_hpc.runtime.tables import table
from llama_hpc.runtime.topology import hostname, node_cores, node_cpus

_TITLES = ("ranks", "host", "threads each", "cores each", "cpus", "NUMA", "device")
_MOST_LINES = 24                # of a table; with more, hosts that are alike share a line
_WIDTH = 40                     # of a list of numbers


@dataclass(frozen=True)
class Place:
    """Where one rank runs: the ``cpus`` that its ``threads`` may use, their ``cores`` (see ``cores_of``) and NUMA nodes; whether
    each thread has a place of its own (``bound``); of the node the cores that the job may use, and whether ``cpus`` are all that
    the job may use there (``whole``); and what computes (``device``)."""

    host: str
    threads: int
    cpus: frozenset[int]
    cores: frozenset[int]
    numa: frozenset[int]
    bound: bool
    node_cores: int
    whole: bool
    device: Choice = CPU


def own_place(threads: int, places: list[set[int]] | None, root: Path = ROOT) -> Place:
    """That of this process, whose threads are about to be bound to ``places`` (see ``thread_places``)."""
    mask = os.sched_getaffinity(0)
    cpus = frozenset(mask if places is None else set().union(*places))
    numa = frozenset(number for number, node in enumerate(numa_nodes(root)) if node & cpus)
    return Place(hostname(), threads, cpus, frozenset(cores_of(cpus, root)), numa, places is not None, node_cores(root),
                 cpus == node_cpus(root))


def rank_text(ranks: Iterable[int]) -> str:
    """``0-3,8``, cut where it gets long."""
    return _cut(cpu_text(set(ranks)))


def launch_table(places: Sequence[Place]) -> list[str]:
    """Lines about all ranks, in their order; consecutive ones of a host share a line if they have as much each."""
    blocks = [_rows(host, ranks, places) for host, ranks in _by_host(places).items()]
    if sum(map(len, blocks)) > _MOST_LINES:
        blocks = _folded(blocks)
    rows = [(rank_text(ranks), host, *rest) for block in blocks for ranks, host, *rest in block]
    return table(_TITLES, rows, left=("host", "cpus", "NUMA", "device"))


def _by_host(places: Sequence[Place]) -> dict[str, list[int]]:
    """The ranks of each host, hosts by their first rank."""
    hosts: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.host, []).append(rank)
    return hosts


def _rows(host: str, ranks: list[int], places: Sequence[Place]) -> list[tuple]:
    """(ranks, host, cells) of each line about a host."""
    groups: list[list[int]] = []
    for rank in ranks:
        if not groups or _kind(places[groups[-1][0]]) != _kind(places[rank]):
            groups.append([])
        groups[-1].append(rank)
    rows = []
    for group in groups:
        first = places[group[0]]
        cpus, numa = (frozenset().union(*parts) for parts in zip(*((places[r].cpus, places[r].numa) for r in group), strict=True))
        rows.append((group, host, str(first.threads), str(len(first.cores)), _cut(cpu_text(cpus)), _cut(cpu_text(numa)),
                     devices_text([places[r].device for r in group])))
    return rows


def _kind(place: Place) -> tuple:
    return place.threads, len(place.cores), len(place.numa), place.bound, place.whole, place.device.name


def _folded(blocks: list[list[tuple]]) -> list[list[tuple]]:
    """Neighbouring hosts of which one line says all, and the same but for their ranks, become one line."""
    found: list[list[list[tuple]]] = []
    for block in blocks:
        (ranks, _, *cells), alone = block[0], len(block) == 1
        if found and alone and len(found[-1][0]) == 1:
            (before, _, *others) = found[-1][-1][0]
            if others == cells and len(before) == len(ranks):
                found[-1].append(block)
                continue
        found.append([block])
    merged = []
    for run in found:
        (_, first, *cells), (_, last, *_) = run[0][0], run[-1][0]
        ranks = [rank for block in run for rank in block[0][0]]
        merged.append(run[0] if len(run) == 1 else [(ranks, f"{first} … {last} ({len(run)} hosts)", *cells)])
    return merged


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 2].rpartition(',')[0]},…"


def launch_warnings(places: Sequence[Place], library: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with how the ranks at these ``places`` were started, one line for each kind of fault; the first one asks.
    ``library``: MPI's name and version."""
    return [*_binding(places), *_launcher(places[0], library, environ)]


def _binding(places: Sequence[Place]) -> list[str]:
    found: dict[str, list[str]] = {}
    for host, ranks in _by_host(places).items():
        for cure, text in _faults(host, ranks, places):
            found.setdefault(cure, []).append(text)
    def line(cure: str, texts: list[str]) -> str:
        others = f" (and {len(texts) - 1} more like this)" if len(texts) > 1 else ""
        return f"{texts[0]}{others}: {cure}"
    return [line(cure, texts) for cure, texts in found.items()]


def _faults(host: str, ranks: list[int], places: Sequence[Place]) -> Iterable[tuple[str, str]]:
    """(cure, fault) of one host."""
    threads, cores = (sum(places[r].threads for r in ranks), max(places[r].node_cores for r in ranks))
    if threads > cores:
        yield ("start fewer ranks on a node, or give them fewer --threads",
               f"{host} has {cores} cores for {threads} threads of {len(ranks)} ranks")
        return
    for group in _sharing(ranks, places):
        union = frozenset().union(*(places[r].cores for r in group))
        threads, where = sum(places[r].threads for r in group), f"{_ranks(group)} on {host}"
        if threads > len(union):
            yield ("let the launcher give each rank as many cores as it has threads (llama-hpc info shows how)",
                   f"{threads} threads of {where} share {len(union)} core{'s' * (len(union) > 1)}")
        elif any(not places[r].bound and places[r].whole and (len(group) > 1 or len(places[r].numa) > 1) for r in group):
            domains = len(frozenset().union(*(places[r].numa for r in group)))
            between = f" and {domains} NUMA nodes" if domains > 1 else ""
            yield ("let the launcher bind ranks to cores (llama-hpc info shows how), or set OMP_PROC_BIND and OMP_PLACES",
                   f"{where} may move over {len(union)} cores{between}")


def _sharing(ranks: list[int], places: Sequence[Place]) -> list[list[int]]:
    """The ranks divided into groups that have no core in common."""
    groups: list[tuple[set[int], list[int]]] = []
    for rank in ranks:
        cores, members = set(places[rank].cores), [rank]
        apart = []
        for other in groups:
            if other[0] & cores:
                cores, members = cores | other[0], other[1] + members
            else:
                apart.append(other)
        groups = [*apart, (cores, members)]
    return [sorted(members) for _, members in sorted(groups, key=lambda group: min(group[1]))]


def _ranks(group: list[int]) -> str:
    return f"rank{'s' * (len(group) > 1)} {rank_text(group)}"


def _launcher(place: Place, library: str, environ: Mapping[str, str]) -> list[str]:
    """Sources: the output environment variables of srun(1) and sbatch(1)."""
    # mpirun, too, starts its daemons through srun.
    by_srun = "SLURM_PROCID" in environ and not {"OMPI_COMM_WORLD_RANK", "MPI_LOCALNRANKS"} & environ.keys()
    if not by_srun:
        return []
    found = []
    if "Open MPI" in library and not any(name.startswith("PMIX_") for name in environ):
        found.append("srun started Open MPI without PMIx, so that several ranks would each be alone: srun --mpi=pmix")
    wanted = environ.get("SLURM_CPUS_PER_TASK", "")
    if wanted.isdecimal() and "SRUN_CPUS_PER_TASK" not in environ and len(place.cpus) < int(wanted):
        found.append(f"srun gave each rank {len(place.cpus)} of the {wanted} cpus per task that the job asked for, as it does "
                     "not take them from sbatch: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun")
    return found
