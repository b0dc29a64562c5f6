"""How this rank, its node and its devices are. Linux; no MPI.

Sources: sysfs of hwmon (as psutil reads it) and of EDAC, the kernel's error detection and correction of memory.
"""

from pathlib import Path

import psutil

from llama_hpc.kernels.cpu.places import ROOT, read
from llama_hpc.runtime.tables import size
from llama_hpc.runtime.topology import memory_limits

# Sensors of processors, as the kernel names their drivers: Intel, AMD, Arm and others.
_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "scpi_sensors", "soc_thermal")


def memory_text() -> str:
    """``rank 1.21 GiB, node 14.20 GiB of 23.40 GiB left``; a cgroup with less room stands for the node."""
    left, limit = min(memory_limits(), key=lambda each: each[0])
    return f"rank {size(psutil.Process().memory_info().rss)}, node {size(left)} of {size(limit)} left"


def device_facts(root: Path = ROOT) -> list[str]:
    """What sensors tell of the devices of this node, such as ``cpu 61 °C``; empty where nothing can be read."""
    return [*_temperatures(), *_memory_errors(root)]


def _temperatures() -> list[str]:
    try:
        found = psutil.sensors_temperatures()
    except (AttributeError, OSError):
        return []
    cpus = [sensor.current for name in _SENSORS for sensor in found.get(name, ())]
    return [f"cpu {max(cpus):.0f} °C"] if cpus else []


def _memory_errors(root: Path) -> list[str]:
    """Errors of memory since the node was started, where there were any."""
    counts = {"corrected": "ce_count", "uncorrected": "ue_count"}
    controllers = list((root / "sys/devices/system/edac/mc").glob("mc*"))
    totals = {kind: sum(int(read(folder / name) or 0) for folder in controllers) for kind, name in counts.items()}
    return [f"{total} {kind} memory errors" for kind, total in totals.items() if total]
