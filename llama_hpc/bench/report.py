"""What benchmarks write: measurements as JSON and HDF5.

A measurement is a frozen dataclass of strings and numbers. ``NAME.json`` holds where it came from and a list for each kind of
measurement; ``NAME.h5`` the same as root attributes and one compound dataset for each kind, a row a measurement:
``pandas.DataFrame(h5py.File("NAME.h5")["products"][:])``.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llama_hpc.errors import UsageError
from llama_hpc.kernels.cpu.places import cache_sizes
from llama_hpc.kernels.cpu.target import kernels
from llama_hpc.results.provenance import store
from llama_hpc.runtime.provenance import collect


class Report:
    """Collects measurements and writes them as ``output`` with the suffixes .json and .h5; it may have one of them."""

    def __init__(self, output: str):
        """Raises UsageError where the files could not be written."""
        path = Path(output)
        base = path.with_suffix("") if path.suffix in (".json", ".h5") else path
        self.paths = [base.parent / (base.name + suffix) for suffix in (".json", ".h5")]
        for target in self.paths:
            if target.is_dir() or not os.access(target.parent, os.W_OK):
                raise UsageError(f"--output {output}: cannot write {target}; name a file in a folder that you may write to")
        caches = cache_sizes()
        self.facts = {**collect(), "cpu": _cpu(), "kernels": kernels(), "l2_bytes": caches.l2, "l3_bytes": caches.l3}
        self.measurements: dict[str, list] = {}

    def add(self, kind: str, measurement) -> None:
        """Keeps a measurement in the list ``kind``."""
        self.measurements.setdefault(kind, []).append(measurement)

    def write(self) -> None:
        """Both files, each under its name only once it is complete."""
        lists = {kind: [asdict(measurement) for measurement in found] for kind, found in self.measurements.items()}
        for path, write in zip(self.paths, (self._write_json, self._write_hdf5), strict=True):
            partial = path.with_name(path.name + ".partial")
            try:
                write(partial, lists)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        print(f"written to {' and '.join(map(str, self.paths))}")

    def _write_json(self, path: Path, lists: dict[str, list[dict]]) -> None:
        path.write_text(json.dumps(self.facts | lists, indent=2) + "\n", encoding="utf-8")

    def _write_hdf5(self, path: Path, lists: dict[str, list[dict]]) -> None:
        import h5py

        with h5py.File(path, "w") as file:
            store(file, self.facts)
            for kind, rows in lists.items():
                file.create_dataset(kind, data=_compound(rows))


def _compound(rows: list[dict]) -> np.ndarray:
    """Dictionaries of the same keys as a structured array: int64, float64, and UTF-8 strings as long as the longest."""
    def dtype(name: str):
        values = [row[name] for row in rows]
        if isinstance(values[0], str):
            return f"S{max(1, *(len(value.encode()) for value in values))}"
        return "i8" if all(isinstance(value, int) for value in values) else "f8"
    names = list(rows[0])
    found = np.zeros(len(rows), [(name, dtype(name)) for name in names])
    for name in names:
        found[name] = [row[name].encode() if isinstance(row[name], str) else row[name] for row in rows]
    return found


def _cpu() -> str:
    import llvmlite.binding
    return llvmlite.binding.get_host_cpu_name()
