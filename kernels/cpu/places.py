"""What a worker pool must know of its node: cores, caches, NUMA domains, and the place of each thread. Linux; plain Python.

Every function reads the kernel's files under ``root`` (default: this machine) and gets by without them.

Sources: the kernel's documents of sysfs cpu topology, caches and nodes and of cgroup-v1 and cgroup-v2;
sched_setaffinity(2); OpenMP API 5.2 on thread affinity, OMP_PLACES and OMP_PROC_BIND.
"""

import os
import re
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
DOMAINS = ("threads", "cores", "ll_caches", "numa_domains", "sockets")
BINDS = ("false", "true", "close", "compact", "spread", "primary", "master")

_COUNTS = r"(?::0*([1-9]\d*)(?::([+-]?\d+))?)?"
_NUMBERS = re.compile(rf"(!?)(\d+){_COUNTS}")
_PLACES = re.compile(rf"(!?)(?:\{{([^{{}}]+)\}}|(\d+)){_COUNTS}")
_ABSTRACT = re.compile(rf"({'|'.join(DOMAINS)})(?:\(0*([1-9]\d*)\))?")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Caches(NamedTuple):
    """Bytes of the data caches that a cpu uses, and how many physical cores share the L3."""

    l1d: int
    l2: int
    l3: int
    l3_cores: int


def num_cpus(root: Path = ROOT) -> int:
    """Physical cores that this process may use: those of its affinity, limited by a cgroup's CPU quota (at least 1)."""
    return max(1, min(physical_cores(os.sched_getaffinity(0), root), cpu_quota(root)))


def physical_cores(cpus: set[int], root: Path = ROOT) -> int:
    """Number of cores that the logical ``cpus`` belong to."""
    return len(cores_of(cpus, root))


def cores_of(cpus: set[int], root: Path = ROOT) -> set[int]:
    """The cores that the logical ``cpus`` belong to, each by the lowest number of its hardware threads."""
    return {min(_siblings(cpu, root)) for cpu in cpus}


def all_cpus(root: Path = ROOT) -> set[int]:
    """The cpus of the node that are switched on."""
    return cpu_list(read(root / "sys/devices/system/cpu/online")) or set(range(os.cpu_count() or 1))


def cache_sizes(root: Path = ROOT, cpu: int | None = None) -> Caches:
    """The caches of ``cpu`` (default: the first one that this process may use).

    What the system does not tell is taken to be 32 KiB, 512 KiB, and 8 MiB shared by the whole node.
    """
    return _cache_sizes(root, min(os.sched_getaffinity(0)) if cpu is None else cpu)


@cache
def _cache_sizes(root: Path, cpu: int) -> Caches:
    found = _caches(cpu, root)
    sizes = [found.get(level, ("", 0))[1] or default for level, default in ((1, 32 << 10), (2, 512 << 10), (3, 8 << 20))]
    sharing = cpu_list(found[3][0]) if 3 in found else all_cpus(root)
    return Caches(*sizes, max(1, physical_cores(_online(sharing, root), root)))


def numa_nodes(root: Path = ROOT) -> list[set[int]]:
    """The cpus of each NUMA node that has any, by the node's number; one node of all cpus where the system tells none."""
    folders = [path for path in (root / "sys/devices/system/node").glob("node*") if path.name[4:].isdecimal()]
    nodes = [cpu_list(read(path / "cpulist")) for path in sorted(folders, key=lambda path: int(path.name[4:]))]
    return [cpus for cpus in nodes if cpus] or [all_cpus(root)]


def domains(kind: str, cpus: set[int], root: Path = ROOT) -> list[set[int]]:
    """``cpus`` divided by what they share: the hardware ``threads``, ``cores``, ``ll_caches`` (last-level caches),
    ``numa_domains`` or ``sockets`` of OpenMP. Neighbours in the list are near each other: NUMA nodes come one after the
    other, within one the cores by number, the hardware threads of a core side by side. Cpus that are offline are left out.
    """
    node_of = {cpu: number for number, node in enumerate(numa_nodes(root)) for cpu in node}
    shared = {
        "threads": lambda cpu: cpu,
        "cores": lambda cpu: _siblings(cpu, root),
        "ll_caches": lambda cpu: _last_cache(cpu, root),
        "numa_domains": lambda cpu: node_of.get(cpu, 0),
        "sockets": lambda cpu: read(_cpu(cpu, root) / "topology/physical_package_id"),
    }[kind]
    found: dict = {}
    for cpu in sorted(_online(cpus, root), key=lambda cpu: (node_of.get(cpu, 0), min(_siblings(cpu, root)), cpu)):
        found.setdefault(shared(cpu), set()).add(cpu)
    return list(found.values())


def places(threads: int, bind: str | None = None, places: str | None = None, mask: set[int] | None = None,
           root: Path = ROOT) -> list[set[int]] | None:
    """The cpus that each of ``threads`` threads is to be bound to, or None where the system may move them.

    ``bind`` and ``places`` have the syntax of OMP_PROC_BIND and OMP_PLACES, which also are their defaults; the empty string
    is unset. ``mask`` holds the cpus that may be used at all (default: the affinity of the calling thread, which is no
    longer that of the process once the thread itself has been bound).

    With neither, threads are bound, one a core, only where ``mask`` has exactly as many cores as there are threads,
    as when a launcher bound this rank. ``bind`` alone means places of one core; ``places`` alone, ``true``; ``true`` and
    ``compact`` are ``close``; of a list of policies, which are for nested levels, the first one counts. Places are cut to
    ``mask``, and those that it leaves empty are dropped.
    Raises ValueError for what is not in the syntax and for places that have no cpu of ``mask``.
    """
    bind = _chosen(bind, "OMP_PROC_BIND").lower()
    listed = _chosen(places, "OMP_PLACES")
    mask = _online(os.sched_getaffinity(0) if mask is None else mask, root)
    policies = [name.strip() for name in bind.split(",")] if bind else []
    for name in policies:
        if name not in BINDS or (len(policies) > 1 and name in ("true", "false")):
            raise ValueError(f"OMP_PROC_BIND is '{bind}', but must be one of {', '.join(BINDS)}")
    available = _place_list(listed, mask, root) if listed else domains("cores", mask, root)
    if bind == "false" or (not bind and not listed and len(available) != threads):
        return None
    count = len(available)
    if policies and policies[0] in ("primary", "master"):
        return [available[0]] * threads
    # Fewer threads than places: neighbours when close, the first place of equal parts when spread. More: equal runs of
    # consecutive threads on each place.
    close = not policies or policies[0] != "spread"
    return [available[i if close and threads <= count else i * count // threads] for i in range(threads)]


def _place_list(text: str, mask: set[int], root: Path) -> list[set[int]]:
    """The places that a value of OMP_PLACES describes, cut to ``mask``; at least one."""
    plain = "".join(text.split()).lower()
    if named := _ABSTRACT.fullmatch(plain):
        found = domains(named[1], mask, root)[:int(named[2]) if named[2] else None]
    else:
        found = []
        for without, inner, number, length, stride in _items(_PLACES, plain, text):
            place: set[int] = set()
            for exclude, first, count, step in _items(_NUMBERS, inner or number, text):
                cpus = {int(first) + index * int(step or 1) for index in range(int(count or 1))}
                place = place - cpus if exclude else place | cpus
            for index in range(int(length or 1)):
                moved = {cpu + index * int(stride or 1) for cpu in place}
                found = [other for other in found if other != moved] if without else [*found, moved]
        found = [place & mask for place in found if place & mask]
    if not found:
        raise ValueError(f"OMP_PLACES is '{text}', which has none of the cpus that this process may use "
                         f"({cpu_text(mask)})")
    return found


def _items(pattern: re.Pattern, plain: str, text: str) -> list[tuple[str, ...]]:
    """The groups of each item of a comma-separated list; ``text`` is the whole value, for the error."""
    if not re.fullmatch(f"{pattern.pattern}(?:,{pattern.pattern})*", plain):
        raise ValueError(f"OMP_PLACES is '{text}', but must be one of {', '.join(DOMAINS)}, with a number in parentheses "
                         "or without, or a list such as {0,1},{2,3} or {0:2}:4:2 (first:count:stride)")
    return pattern.findall(plain)


def _chosen(value: str | None, name: str) -> str:
    return (os.environ.get(name, "") if value is None else value).strip()


def _cpu(cpu: int, root: Path) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _online(cpus: set[int], root: Path) -> set[int]:
    """Those of ``cpus`` that are switched on, as far as the system tells."""
    switched_on = cpu_list(read(root / "sys/devices/system/cpu/online"))
    return cpus & switched_on if switched_on else set(cpus)


def _siblings(cpu: int, root: Path) -> tuple[int, ...]:
    """The hardware threads of this cpu's core."""
    return tuple(sorted(cpu_list(read(_cpu(cpu, root) / "topology/thread_siblings_list")) or {cpu}))


def _caches(cpu: int, root: Path) -> dict[int, tuple[str, int]]:
    """Of each level of data cache: the cpus that share it, as text, and its bytes."""
    found = {}
    for folder in (_cpu(cpu, root) / "cache").glob("index*"):
        level, size = read(folder / "level"), read(folder / "size")
        if level.isdecimal() and read(folder / "type") != "Instruction":
            digits = size.rstrip("KMG")
            bytes_held = int(digits) * _UNITS.get(size[-1:], 1) if digits.isdecimal() else 0
            found[int(level)] = (read(folder / "shared_cpu_list"), bytes_held)
    return found


def _last_cache(cpu: int, root: Path) -> str:
    """The cpus that share this cpu's cache of the highest level, as text."""
    found = _caches(cpu, root)
    return found[max(found)][0] if found else ""


def cpu_quota(root: Path = ROOT) -> float:
    """CPUs that the cgroups allow on average, rounded up; infinity without a limit."""
    quotas = [float("inf")]
    for folder in cgroup_folders("cpu", root):
        quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if limit := read(folder / "cpu.max"):
            quota, period = limit.split()
        if quota.isdecimal() and period.isdecimal():
            quotas.append(ceil(int(quota) / int(period)))
    return min(quotas)


def cgroup_folders(controller: str, root: Path = ROOT) -> list[Path]:
    """Folders of this process's cgroup for ``controller`` (version 2, or 1) and of those that contain it."""
    for line in read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
            if not (base / "cgroup.controllers").exists():
                continue
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = base / path.lstrip("/")
        return [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return []


def cpu_list(text: str) -> set[int]:
    """``0-3,8`` as {0, 1, 2, 3, 8}; the empty text as no cpus."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cpu_text(cpus: set[int]) -> str:
    """{0, 1, 2, 3, 8} as ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def read(path: Path) -> str:
    """The text of a kernel file, stripped; empty where there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
