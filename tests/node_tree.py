"""Made-up nodes: the files of the kernel from which cores, caches and NUMA nodes are read."""

from pathlib import Path


def write_files(root: Path, files: dict[str, object]) -> Path:
    """Writes each text to the path of its name under ``root``; returns ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def write_node(root: Path, sockets: int = 1, nodes: int = 1, cores: int = 4, smt: int = 1, l3_cores: int | None = None,
               offline: tuple[int, ...] = ()) -> Path:
    """A node of ``sockets`` with ``nodes`` NUMA nodes each, ``cores`` in each of those, and ``smt`` hardware threads a core.

    Cpus are numbered as Linux does on most machines: first hardware threads of all cores, then the second ones.
    ``l3_cores`` share an L3 (default: those of a NUMA node). Returns ``root``.
    """
    total, l3_cores = sockets * nodes * cores, l3_cores or cores
    def listed(numbers):
        return ",".join(str(cpu + thread * total) for thread in range(smt) for cpu in numbers
                        if cpu + thread * total not in offline)
    files = {"online": ",".join(str(cpu) for cpu in range(total * smt) if cpu not in offline)}
    for cpu in set(range(total * smt)) - set(offline):
        core = cpu % total
        first = core // l3_cores * l3_cores
        files[f"cpu{cpu}/topology/thread_siblings_list"] = listed([core])
        files[f"cpu{cpu}/topology/physical_package_id"] = core // (nodes * cores)
        for index, (level, kind, size, sharing) in enumerate((
                (1, "Data", "48K", [core]), (1, "Instruction", "32K", [core]), (2, "Unified", "2048K", [core]),
                (3, "Unified", "32M", range(first, first + l3_cores)))):
            folder = f"cpu{cpu}/cache/index{index}"
            files |= {f"{folder}/level": level, f"{folder}/type": kind, f"{folder}/size": size,
                      f"{folder}/shared_cpu_list": listed(sharing)}
    for node in range(sockets * nodes):
        files[f"../node/node{node}/cpulist"] = listed(range(node * cores, (node + 1) * cores))
    return write_files(root, {f"sys/devices/system/cpu/{name}": text for name, text in files.items()})
