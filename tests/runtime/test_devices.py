"""Which GPU of its node a rank takes, and what is said where it takes none: on made-up nodes, without a GPU."""

import subprocess
import sys

import pytest
from node_tree import write_files

from llama_hpc.errors import DeviceUnavailable, UsageError
from llama_hpc.kernels.cuda import device as cuda
from llama_hpc.kernels.cuda.device import DeviceError, DeviceFacts
from llama_hpc.runtime import devices
from llama_hpc.runtime.devices import CPU, Choice, Sight, choose, devices_text, gpus_text, look, memory_of, refusal, without_gpu

GIB = 1 << 30
H200 = 150_754_820_096


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(devices, "hostname", lambda: "n1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def node(tmp_path):
    """The files of a node with a driver and four GPUs."""
    return write_files(tmp_path, {"proc/driver/nvidia/version": "NVRM", "dev/nvidiactl": "",
                                  **{f"dev/nvidia{number}": "" for number in range(4)}})


def gpu(place, number=None, architecture=90, name="NVIDIA H200"):
    """The GPU at a place of the node, with the number that a process has for it."""
    bus = f"0000:{place:02x}:00.0"
    return DeviceFacts(place if number is None else number, name, H200, architecture, bus, f"{bus} ff")


def seen(*gpus):
    return Sight(tuple(gpus))


def taken(*sights):
    return [choice.bus[5:7] if choice.kind == "gpu" else choice.why for choice in choose(sights)]


def test_a_node_without_a_driver_is_not_asked(tmp_path):
    def asked():
        raise AssertionError
    assert look("auto", tmp_path, asked) == Sight(why="no NVIDIA driver", surprising=False)
    write_files(tmp_path, {"proc/driver/nvidia/version": "NVRM", "dev/nvidiactl": ""})
    assert look("auto", tmp_path, asked) == Sight(why="an NVIDIA driver, but no GPU")
    assert look("cpu", tmp_path, asked) == Sight(surprising=False)


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_surprise_nobody(node, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert look("auto", node, list) == Sight(why=f"CUDA_VISIBLE_DEVICES={value!r} hides all GPUs", surprising=False)


def test_looking_for_no_gpu_loads_nothing():
    code = """
import sys
from pathlib import Path
from llama_hpc.runtime.devices import look
look("cpu"), look("auto", Path("/nowhere")), look("gpu", Path("/nowhere"))
assert not [name for name in sys.modules if name.startswith(("cupy", "pynvml"))]
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_what_is_seen(node):
    found = [gpu(0), gpu(1)]
    assert look("auto", node, lambda: found) == Sight(tuple(found))
    # The numbers of those that are left are CUDA's.
    assert look("gpu", node, lambda: [gpu(0, architecture=60), gpu(1)]).devices == (gpu(1),)


def raising(message):
    def fail():
        raise DeviceError(message)
    return fail


UNUSABLE = {
    "too old": (lambda: [gpu(0, architecture=70, name="V100")], "V100 has architecture sm_70, sm_75 or newer is needed"),
    "no CuPy": (raising("CuPy cannot be imported (No module named 'cupy')"), "CuPy cannot be imported (No module named 'cupy')"),
    "none": (list, "no GPU that this rank may use"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_gpus_that_cannot_be_used(node, case):
    """One clear line, with exit code 1 if a GPU was asked for."""
    found, why = UNUSABLE[case]
    sight = look("auto", node, found)
    assert sight == Sight(why=why)
    (choice,) = choose([sight])
    error = refusal(choice)
    assert isinstance(error, DeviceUnavailable) and error.exit_code == 1
    assert str(error) == f"--device gpu on n1: {why}; --device auto or cpu computes on the CPU"
    assert without_gpu([choice], ["n1"]) == (f"all ranks compute on the CPU: {why} (n1)", True)


def test_the_nth_rank_takes_the_nth_gpu():
    every = seen(*map(gpu, range(4)))
    assert taken(*[every] * 4) == ["00", "01", "02", "03"]
    assert [choice.number for choice in choose([every] * 3)] == [0, 1, 2]
    # As CUDA_VISIBLE_DEVICES=3,1 numbers them.
    assert taken(*[seen(gpu(3, 0), gpu(1, 1))] * 2) == ["03", "01"]


def test_a_rank_takes_the_one_that_it_was_bound_to():
    """As srun --gpus-per-task=1 does: all call it number 0."""
    choices = choose([seen(gpu(2, 0)), seen(gpu(0, 0)), seen(gpu(1, 0))])
    assert [(choice.bus[5:7], choice.number) for choice in choices] == [("02", 0), ("00", 0), ("01", 0)]
    # Two ranks that see the same one do not share it.
    assert taken(seen(gpu(0, 0)), seen(gpu(0, 0))) == ["00", "1 GPU for 2 ranks"]
    # Who has no choice comes first.
    assert taken(seen(gpu(0), gpu(1)), seen(gpu(0))) == ["01", "00"]


def test_slices_of_a_gpu_are_gpus():
    """MIG: one place on the bus, an identity each."""
    slices = [DeviceFacts(0, "NVIDIA H100 MIG 1g.10gb", 10 * GIB, 90, "0000:00:00.0", f"0000:00:00.0 {n}") for n in range(2)]
    assert [choice.kind for choice in choose([seen(each) for each in slices])] == ["gpu", "gpu"]


def test_more_ranks_than_gpus():
    """The surplus computes on the CPU, or one line says how many there are of each, with exit code 2."""
    choices = choose([seen(gpu(0), gpu(1))] * 4)
    assert [choice.kind for choice in choices] == ["gpu", "gpu", "cpu", "cpu"]
    error = refusal(choices[2])
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert str(error).startswith("--device gpu on n1: 2 GPUs for 4 ranks; start one rank for each GPU")
    assert without_gpu(choices, ["n1"] * 4) == ("ranks 2-3 compute on the CPU: 2 GPUs for 4 ranks (n1)", True)
    assert without_gpu(choices * 3, sorted(["n1", "n2", "n3"] * 4)) == (
        "ranks 2-3,6-7,10-11 compute on the CPU: 2 GPUs for 4 ranks (n1 and 2 more hosts)", True)


def test_what_is_said_of_ranks_without_a_gpu():
    none, old = Choice(why="no NVIDIA driver"), Choice(why="too old", surprising=True)
    got = Choice("gpu", 0, "NVIDIA H200", H200, "0000:00:00.0")
    assert without_gpu([got, got], ["a", "a"]) == ("", False) and without_gpu([CPU], ["a"]) == ("", False)
    # Nobody counts on a GPU where no node has one.
    assert without_gpu([none, none], ["a", "b"]) == ("all ranks compute on the CPU: no NVIDIA driver (a and 1 more host)", False)
    assert without_gpu([got, none], ["a", "b"]) == ("rank 1 computes on the CPU: no NVIDIA driver (b)", True)
    assert without_gpu([none, old], ["a", "b"]) == ("all ranks compute on the CPU: too old (b); 1 more reason elsewhere", True)


def test_names():
    choices = choose([seen(*map(gpu, range(4)))] * 4)
    assert choices[2].text == "gpu 2, NVIDIA H200 (140.40 GiB)" and CPU.text == "cpu"
    assert devices_text(choices) == "gpu 0-3, NVIDIA H200 (140.40 GiB)" and devices_text([CPU, CPU]) == "cpu"
    assert gpus_text(seen(gpu(0), gpu(1))) == "2: NVIDIA H200 (140.40 GiB), NVIDIA H200 (140.40 GiB)"
    assert gpus_text(Sight(why="no NVIDIA driver")) == "none: no NVIDIA driver"
    bound = choose([seen(gpu(place, 0)) for place in range(4)])
    assert devices_text(bound) == "gpu 0 each, NVIDIA H200 (140.40 GiB)"


def test_memory_is_that_of_the_gpu_or_a_share_of_the_node(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 64 * GIB)
    (choice,) = choose([seen(gpu(3))])
    assert memory_of(CPU, 4) == 16 * GIB and memory_of(choice, 4, free=lambda number: number * GIB) == 3 * GIB
    def lost(number):
        raise DeviceError(f"GPU {number} cannot be used: lost")
    with pytest.raises(DeviceUnavailable, match=r"gpu 3, NVIDIA H200 \(140.40 GiB\) of n1: GPU 3 cannot be used: lost"):
        memory_of(choice, 4, free=lost)


class Runtime:
    """CuPy's ``cuda.runtime``, as far as it is asked what there is."""

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status):
            super().__init__(f"cudaError {status}")
            self.status = status

    def __init__(self, status=0, driver=13000, facts=()):
        self.status, self.driver, self.facts = status, driver, facts

    def runtimeGetVersion(self):
        return 13020

    def driverGetVersion(self):
        return self.driver

    def getDeviceCount(self):
        if self.status:
            raise self.CUDARuntimeError(self.status)
        return len(self.facts)

    def getDeviceProperties(self, number):
        return self.facts[number]

    def deviceGetPCIBusId(self, number):
        return f"0000:{number:02X}:00.0"


@pytest.fixture
def runtime(monkeypatch):
    """The function that makes a ``Runtime`` CuPy's."""
    def make(**options):
        cupy = type("cupy", (), {"cuda": type("cuda", (), {"runtime": Runtime(**options)})})
        monkeypatch.setattr(cuda, "_cupy", lambda: cupy)
    return make


def test_devices_as_cuda_tells_them(runtime):
    runtime(facts=[{"name": b"NVIDIA T4", "totalGlobalMem": 15 * GIB, "major": 7, "minor": 5, "uuid": b"\x01\x02"},
                   {"name": b"NVIDIA H200", "totalGlobalMem": H200, "major": 9, "minor": 0, "uuid": b""}])
    assert cuda.visible_devices() == [
        DeviceFacts(0, "NVIDIA T4", 15 * GIB, 75, "0000:00:00.0", "0000:00:00.0 0102"),
        DeviceFacts(1, "NVIDIA H200", H200, 90, "0000:01:00.0", "0000:01:00.0 ")]


@pytest.mark.parametrize(("status", "driver", "visible", "expected"), [
    (35, 0, None, "the library of the NVIDIA driver, libcuda.so.1, cannot be loaded"),
    (35, 12040, None, "CuPy is built for CUDA 13.2, but the NVIDIA driver knows CUDA 12.4 at most: install cupy-cuda12x"),
    (100, 13000, "", "there is no GPU for CUDA_VISIBLE_DEVICES=''"), (100, 13000, None, "there is no GPU"),
    (999, 13000, None, "CUDA cannot be used: cudaError 999")])
def test_why_cuda_cannot_be_used(runtime, monkeypatch, status, driver, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runtime(status=status, driver=driver)
    with pytest.raises(DeviceError) as caught:
        cuda.visible_devices()
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
