"""How GPUs are: temperature, memory, clocks and errors, through NVML (package nvidia-ml-py), where it is there.

Source: the NVML API Reference Guide.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from llama_hpc.runtime.devices import Choice
from llama_hpc.runtime.tables import size

# What holds clocks down, of nvmlDeviceGetCurrentClocksEventReasons: power limits are usual, the others are not.
_HEAT, _BRAKE, _POWER = 0x20 | 0x40, 0x8 | 0x80, 0x4
_SLOWED = ((_HEAT, "slowed down by heat"), (_BRAKE, "slowed down by its power supply"), (_POWER, "at its power limit"))


class GpuMonitor:
    """How the GPU of a ``choice`` is, and what has befallen it since the last call of ``work``. Of a CPU, and without NVML, it
    tells nothing. Raises nothing."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self._nvml = _nvml() if choice.kind == "gpu" else None
        self._handle = self._ask(lambda nvml: nvml.nvmlDeviceGetHandleByPciBusId(choice.bus))
        if self._handle is None:
            self._nvml = None
        self._counted = self._counts()

    def facts(self) -> list[str]:
        """Such as ``63 °C``, ``71.20 GiB of 79.60 GiB used``, ``1980 MHz``, and what is wrong with it."""
        found = []
        if (temperature := self._temperature()) is not None:
            found.append(f"{temperature} °C")
        if (memory := self._memory()) is not None:
            found.append(f"{size(memory.used)} of {size(memory.total)} used")
        if (clock := self._clock()) is not None:
            found.append(f"{clock} MHz")
        reasons = self._reasons()
        found += [text for bits, text in _SLOWED if reasons & bits]
        counts = self._counts()
        found += [f"{counts[name]:.0f} {name} memory errors" for name in ("corrected", "uncorrected") if counts.get(name)]
        return found

    def work(self) -> dict[str, float]:
        """Numbers for the metrics of a rank, those that NVML tells: ``gpu_temperature`` °C, ``gpu_memory`` bytes in use and
        ``gpu_clock`` MHz now; since the last call ``gpu_corrected_errors``, ``gpu_uncorrected_errors``, and the seconds in which
        heat or the power limit held clocks down, ``gpu_heat_seconds`` and ``gpu_power_seconds``."""
        memory = self._memory()
        now = {"gpu_temperature": self._temperature(), "gpu_memory": memory and memory.used, "gpu_clock": self._clock()}
        before, self._counted = self._counted, self._counts()
        units = {"corrected": "errors", "uncorrected": "errors", "heat": "seconds", "power": "seconds"}
        # A driver that was loaded anew counts from 0.
        since = {f"gpu_{name}_{units[name]}": max(0, count - before.get(name, count)) for name, count in self._counted.items()}
        return {name: float(value) for name, value in now.items() if value is not None} | since

    def _temperature(self) -> int | None:
        return self._ask(lambda nvml: nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU))

    def _memory(self):
        return self._ask(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(self._handle))

    def _clock(self) -> int | None:
        return self._ask(lambda nvml: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))

    def _reasons(self) -> int:
        return self._ask(lambda nvml: nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)) or 0

    def _counts(self) -> dict[str, float]:
        """Errors of memory (ECC) since the driver was loaded; seconds in which clocks were held down."""
        found: dict[str, float | None] = {}
        for name in ("corrected", "uncorrected"):
            found[name] = self._ask(lambda nvml, name=name: nvml.nvmlDeviceGetTotalEccErrors(
                self._handle, getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{name.upper()}"), nvml.NVML_VOLATILE_ECC))
        for name, policy in (("heat", "THERMAL"), ("power", "POWER")):
            status = self._ask(lambda nvml, policy=policy: nvml.nvmlDeviceGetViolationStatus(
                self._handle, getattr(nvml, f"NVML_PERF_POLICY_{policy}")))
            found[name] = None if status is None else status.violationTime / 1e9
        return {name: count for name, count in found.items() if count is not None}

    def _ask(self, question: Callable[[Any], Any]):
        """The answer, or None where this GPU, driver or package has none."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError, AttributeError):
            return question(self._nvml)
        return None


def gpu_facts(monitors: Sequence[GpuMonitor]) -> list[str]:
    """A text for each GPU of a node that tells anything."""
    texts = [(monitor.choice.number, ", ".join(monitor.facts())) for monitor in monitors]
    return [f"gpu {number} {text}" for number, text in texts if text]


@cache
def _nvml():
    """The module pynvml, its library started; None where one of them is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
