"""One GPU: its memory, and the launching of kernels. Through CuPy, which is imported when a device is opened.

Launchers elsewhere in this folder take a ``Device`` and its arrays; anything with the same methods will do for one.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .compiler import OLDEST, compile_source, sources

# cudaError_t of the CUDA Runtime API.
_INSUFFICIENT_DRIVER, _NO_DEVICE, _NOT_READY = 35, 100, 600
# A kernel gets more shared memory than this only when that was asked for: by these CUfunction_attributes, of which the second one
# is the percentage of a multiprocessor's memory.
_SHARED_BYTES, _MAX_DYNAMIC_SHARED, _CARVEOUT = 48 << 10, 8, 9


class DeviceError(RuntimeError):
    """No GPU, one that is too old, or one that was lost; says which, and what to do."""


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU that this process may use: its ``number`` here, ``memory_bytes`` in all, ``architecture`` (90 for sm_90), where it is
    on the PCI ``bus``; ``identity`` is the same in all processes of the node, and of one slice (MIG) of it only."""

    number: int
    name: str
    memory_bytes: int
    architecture: int
    bus: str
    identity: str


def visible_devices() -> list[DeviceFacts]:
    """The GPUs that CUDA_VISIBLE_DEVICES and the scheduler leave to this process. Opens none. Raises DeviceError."""
    runtime = _cupy().cuda.runtime
    try:
        found = [(runtime.getDeviceProperties(number), runtime.deviceGetPCIBusId(number))
                 for number in range(runtime.getDeviceCount())]
    except runtime.CUDARuntimeError as error:
        raise DeviceError(_explained(runtime, error)) from None
    # CuPy cuts UUIDs at a zero byte: the bus alone tells whole GPUs apart.
    return [DeviceFacts(number, facts["name"].decode(), facts["totalGlobalMem"], 10 * facts["major"] + facts["minor"], bus,
                        f"{bus} {facts['uuid'].hex()}") for number, (facts, bus) in enumerate(found)]


def free_memory(number: int) -> int:
    """Bytes of a GPU that this process may still take, with its own CUDA context, which is made, already taken."""
    runtime = _cupy().cuda.runtime
    try:
        with _cupy().cuda.Device(number):
            return runtime.memGetInfo()[0]
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"GPU {number} cannot be used: {error}") from None


def _explained(runtime, error) -> str:
    """Why CUDA cannot be used."""
    built, driver = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime.runtimeGetVersion(),
                                                                                 runtime.driverGetVersion()))
    if error.status == _INSUFFICIENT_DRIVER:
        if driver == "0.0":
            return "the library of the NVIDIA driver, libcuda.so.1, cannot be loaded"
        return (f"CuPy is built for CUDA {built}, but the NVIDIA driver knows CUDA {driver} at most: install "
                f"cupy-cuda{driver.partition('.')[0]}x in place of this CuPy, or a newer driver")
    if error.status == _NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "there is no GPU" + ("" if visible is None else f" for CUDA_VISIBLE_DEVICES={visible!r}")
    return f"CUDA cannot be used: {error}"


class Device:
    """The GPU ``number`` of this process. Everything happens in order on one stream, beside the host, but for copies on streams
    of their own, which are tied to it by events.

    ``architecture``: 90 for sm_90. ``multiprocessors``: how many blocks at least keep it busy. ``shared_bytes``: shared memory
    that a block can have. All methods raise DeviceError.
    """

    def __init__(self, number: int = 0):
        self._cupy = _cupy()
        self.number = number
        try:
            self._device = self._cupy.cuda.Device(number)
            self._device.use()
            facts = self._cupy.cuda.runtime.getDeviceProperties(number)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"GPU {number} cannot be used: {error}") from None
        self.name, self.shared_bytes = facts["name"].decode(), facts["sharedMemPerBlockOptin"]
        self.architecture, self.multiprocessors = 10 * facts["major"] + facts["minor"], facts["multiProcessorCount"]
        if self.architecture < OLDEST:
            raise DeviceError(f"{self.name} has architecture sm_{self.architecture}: sm_{OLDEST} or newer is needed")
        # Tells it from all others, on any host.
        self.identity = facts["uuid"]
        self.stream = self._cupy.cuda.Stream(non_blocking=True)
        self._kernels: dict[tuple[str, str], Any] = {}
        self._modules: dict[str, Any] = {}
        self._shared: dict[tuple[str, str], int] = {}

    def zeros(self, shape, dtype):
        """An array of zeros on the device. Raises DeviceError where it has no room."""
        with self._told(), self.stream:
            return self._cupy.zeros(shape, dtype)

    def upload(self, array: np.ndarray, out=None, stream=None):
        """A copy of ``array`` on the device: into ``out``, or a new one. From pinned memory the host does not wait: it must stay
        as it is until the copy is made."""
        with self._told(), self.stream:
            if out is None:
                out = self._cupy.empty(array.shape, array.dtype)
            out.set(np.ascontiguousarray(array), stream=stream or self.stream)
        return out

    def download(self, array, out: np.ndarray | None = None) -> np.ndarray:
        """A copy of a device array on the host, into ``out`` (contiguous) if given. Waits for what was launched before."""
        with self._told(), self.stream:
            return array.get(stream=self.stream, out=out)

    def fetch(self, array, out: np.ndarray, stream=None) -> None:
        """Begins to copy a device array into ``out``, contiguous and pinned: it is there after ``synchronize``, or once an event
        behind it has passed."""
        with self._told(), self.stream:
            array.get(stream=stream or self.stream, out=out, blocking=False)

    def pinned(self, shape, dtype) -> np.ndarray:
        """An array of zeros of the host, in memory that the device reads at full speed."""
        import cupyx
        return cupyx.zeros_pinned(shape, dtype) if np.prod(shape) else np.zeros(shape, dtype)

    def launch(self, file: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments, shared: int = 0) -> None:
        """Runs ``kernel`` of ``file`` on ``grid`` blocks of ``block`` threads with ``shared`` bytes of shared memory.

        Arguments are device arrays (or None) for pointers, int for int, float for float, NumPy scalars for what they are.
        """
        with self._told():
            self._kernel(file, kernel, shared)(_three(grid), _three(block), tuple(map(_argument, arguments)), shared_mem=shared,
                                               stream=self.stream)

    def _kernel(self, file: str, kernel: str, shared: int):
        if (file, kernel) not in self._kernels:
            if file not in self._modules:
                module = self._cupy.cuda.function.Module()
                module.load(compile_source(file, self.architecture))
                self._modules[file] = module
            self._kernels[file, kernel] = self._modules[file].get_function(kernel)
        function = self._kernels[file, kernel]
        if shared > self._shared.get((file, kernel), _SHARED_BYTES):
            self._cupy.cuda.driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED, shared)
            self._cupy.cuda.driver.funcSetAttribute(function.ptr, _CARVEOUT, 100)
            self._shared[file, kernel] = shared
        return function

    def compile(self) -> None:
        """Compiles all kernels for this device, or finds that it was done on this node before."""
        for name in sources():
            if name.endswith(".cu"):
                compile_source(name, self.architecture)

    def synchronize(self) -> None:
        """Waits until everything launched is done, on the stream that computes."""
        with self._told():
            self.stream.synchronize()

    def new_stream(self):
        """A stream beside the one that computes."""
        return self._cupy.cuda.Stream(non_blocking=True)

    def new_event(self):
        """An event, which has passed until it is recorded."""
        return self._cupy.cuda.Event(disable_timing=True)

    def record(self, event, stream=None) -> None:
        """``event`` will pass when everything on a stream so far is done."""
        with self._told():
            event.record(stream or self.stream)

    def follow(self, event, stream=None) -> None:
        """What comes on a stream from now on waits for ``event``."""
        with self._told():
            (stream or self.stream).wait_event(event)

    def passed(self, event) -> bool:
        """Whether an event has passed."""
        runtime = self._cupy.cuda.runtime
        with self._told():
            # ``event.done`` would be false for ever on a device that was lost.
            status = runtime.eventQuery(event.ptr)
            if status not in (0, _NOT_READY):
                raise runtime.CUDARuntimeError(status)
            return status == 0

    def wait(self, event) -> None:
        """Waits for an event."""
        with self._told():
            event.synchronize()

    @contextmanager
    def _told(self):
        """What CUDA says of this device, as DeviceError; behind an error the device is of no use to this process."""
        cuda = self._cupy.cuda
        try:
            yield
        except cuda.memory.OutOfMemoryError as error:
            raise DeviceError(f"GPU {self.number}, {self.name}, has too little memory: {error}") from None
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"GPU {self.number}, {self.name}, was lost: {error}") from None

    @contextmanager
    def capture(self):
        """Records what is launched inside, instead of running it, into a list that ``replay`` takes."""
        recorded: list[Any] = []
        with self.stream:
            self.stream.begin_capture()
            try:
                yield recorded
            finally:
                recorded.append(self.stream.end_capture())

    def replay(self, recorded: list[Any]) -> None:
        """Runs what was captured."""
        with self._told():
            recorded[0].launch(stream=self.stream)

    def copy(self, source, target) -> None:
        """target = source: contiguous arrays of one size, both on the device."""
        target.data.copy_from_device_async(source.data, source.nbytes, self.stream)

    def seconds(self, run: Callable[[], None], times: int = 1, lead: Callable[[], None] | None = None) -> float:
        """How long the device takes for what ``run`` launches, ``times`` times one after the other.

        It does ``lead`` before, while the host launches what is timed.
        """
        start, end = (self._cupy.cuda.Event() for _ in range(2))
        if lead is not None:
            lead()
        start.record(self.stream)
        for _ in range(times):
            run()
        end.record(self.stream)
        self.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, end) / 1e3

    @property
    def l2_bytes(self) -> int:
        """Size of the second-level cache."""
        return self._device.attributes["L2CacheSize"]

    @property
    def clock_hz(self) -> float:
        """The highest clock rate of the multiprocessors."""
        return 1e3 * self._device.attributes["ClockRate"]

    def free_bytes(self) -> int:
        """Memory that may still be had."""
        return self._cupy.cuda.runtime.memGetInfo()[0]


@cache
def _cupy():
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(f"CuPy cannot be imported ({error}): pip install 'llama_hpc[gpu]'") from None
    return cupy


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    return (*sizes, 1, 1)[:3]


def _argument(value):
    if value is None:
        return np.uint64(0)
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value
