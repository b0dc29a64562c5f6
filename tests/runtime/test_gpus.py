"""How GPUs are, as a made-up NVML tells it: for the heartbeat, the metrics and the closing summary."""

import sys
from types import SimpleNamespace

import pytest

from llama_hpc.runtime import gpus, heartbeat
from llama_hpc.runtime.devices import CPU, Choice
from llama_hpc.runtime.gpus import GpuMonitor, gpu_facts
from llama_hpc.runtime.heartbeat import Heartbeat
from llama_hpc.runtime.progress import Progress

GIB = 1 << 30
SECOND = 10**9


class Nvml:
    """The module pynvml with one GPU a bus. What is None there is not supported."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_VOLATILE_ECC = 0, 1, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    class NVMLError(Exception):
        pass

    def __init__(self, started=True):
        self.started, self.gpus = started, {}

    def add(self, bus, **told):
        self.gpus[bus] = {"temperature": 63, "memory": SimpleNamespace(used=40 * GIB, total=80 * GIB), "clock": 1980,
                          "reasons": 0, "errors": [0, 0], "violations": [0, 0]} | told

    def nvmlInit(self):
        if not self.started:
            raise self.NVMLError

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        if bus not in self.gpus:
            raise self.NVMLError
        return bus

    def _told(self, bus, name):
        if bus is None or self.gpus[bus][name] is None:
            raise self.NVMLError
        return self.gpus[bus][name]

    def nvmlDeviceGetTemperature(self, bus, sensor):
        return self._told(bus, "temperature")

    def nvmlDeviceGetMemoryInfo(self, bus):
        return self._told(bus, "memory")

    def nvmlDeviceGetClockInfo(self, bus, kind):
        return self._told(bus, "clock")

    def nvmlDeviceGetCurrentClocksEventReasons(self, bus):
        return self._told(bus, "reasons")

    def nvmlDeviceGetTotalEccErrors(self, bus, kind, counter):
        return self._told(bus, "errors")[kind]

    def nvmlDeviceGetViolationStatus(self, bus, policy):
        return SimpleNamespace(violationTime=self._told(bus, "violations")[policy])


@pytest.fixture
def nvml(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpus._nvml.cache_clear()
    yield nvml
    gpus._nvml.cache_clear()


def chosen(number):
    return Choice("gpu", number, "NVIDIA H200", 141 * GIB, f"0000:0{number}:00.0")


def told(*choices):
    return gpu_facts([GpuMonitor(choice) for choice in choices])


def test_a_healthy_gpu(nvml):
    nvml.add("0000:02:00.0")
    assert told(chosen(2), CPU) == ["gpu 2 63 °C, 40.00 GiB of 80.00 GiB used, 1980 MHz"]
    assert GpuMonitor(chosen(2)).work() == {
        "gpu_temperature": 63, "gpu_memory": 40 * GIB, "gpu_clock": 1980, "gpu_corrected_errors": 0,
        "gpu_uncorrected_errors": 0, "gpu_heat_seconds": 0, "gpu_power_seconds": 0}


def test_what_is_wrong_is_named(nvml):
    nvml.add("0000:00:00.0", memory=None, clock=1200, reasons=0x44, errors=[3, 1])
    nvml.add("0000:01:00.0", memory=None, temperature=None, clock=800, reasons=0x80)
    assert told(chosen(0), chosen(1)) == [
        "gpu 0 63 °C, 1200 MHz, slowed down by heat, at its power limit, 3 corrected memory errors, 1 uncorrected memory errors",
        "gpu 1 800 MHz, slowed down by its power supply"]


def test_nothing_is_said_of_what_nvml_does_not_tell(nvml, monkeypatch):
    nvml.add("0000:00:00.0", temperature=None, memory=None, clock=None, reasons=None, errors=None, violations=None)
    # One of which NVML knows nothing, as that of another rank may be.
    assert told(chosen(0), chosen(1)) == [] and GpuMonitor(chosen(0)).work() == GpuMonitor(chosen(1)).work() == {}
    # One that falls from the bus in mid-run.
    nvml.add("0000:00:00.0")
    monitor = GpuMonitor(chosen(0))
    nvml.add("0000:00:00.0", temperature=None, memory=None, clock=None, reasons=None, errors=None, violations=None)
    assert monitor.facts() == [] and monitor.work() == {}
    # An older package.
    monkeypatch.delattr(Nvml, "nvmlDeviceGetCurrentClocksEventReasons")
    nvml.add("0000:00:00.0", reasons=0x40)
    assert told(chosen(0)) == ["gpu 0 63 °C, 40.00 GiB of 80.00 GiB used, 1980 MHz"]


@pytest.mark.parametrize("module", [None, Nvml(started=False)], ids=["no package", "no driver"])
def test_without_nvml(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    gpus._nvml.cache_clear()
    assert told(chosen(0)) == [] and GpuMonitor(chosen(0)).work() == {}
    gpus._nvml.cache_clear()


def test_of_a_cpu_nvml_is_not_asked(monkeypatch):
    monkeypatch.setattr(gpus, "_nvml", lambda: pytest.fail("asked"))
    assert told(CPU) == [] and GpuMonitor(CPU).work() == {}


def test_what_befell_it_is_counted_once(nvml):
    nvml.add("0000:00:00.0", errors=[5, 0], violations=[SECOND, 2 * SECOND])
    monitor = GpuMonitor(chosen(0))
    nvml.add("0000:00:00.0", errors=[7, 1], violations=[4 * SECOND, 3 * SECOND])
    found = [monitor.work() for _ in range(2)]
    counted = [[work[f"gpu_{name}"] for name in ("corrected_errors", "uncorrected_errors", "power_seconds", "heat_seconds")]
               for work in found]
    assert counted == [[2, 1, 3, 1], [0, 0, 0, 0]]
    # The driver was loaded anew.
    nvml.add("0000:00:00.0")
    assert monitor.work()["gpu_corrected_errors"] == 0


def test_the_heartbeat_has_the_gpus_of_the_node(nvml, logged, monkeypatch):
    monkeypatch.setattr(heartbeat, "device_facts", lambda: ["cpu 61 °C"])
    for number in range(2):
        nvml.add(f"0000:0{number}:00.0", temperature=50 + number, memory=None)
    beats = Heartbeat(1e-9, [chosen(0), chosen(1), CPU])
    beats.due()
    beats.beat(7, Progress(3, "prompts", "answering", show=False))
    assert logged[0].getMessage().endswith("; cpu 61 °C; gpu 0 50 °C, 1980 MHz; gpu 1 51 °C, 1980 MHz")
