"""A GPU that is none: kernels compiled by the host's C++ compiler and run by ``cuda_emulation.h``, with ``Device``'s methods.

Its arrays are NumPy's. Behind each lie guard bytes, which ``check``, and every download, finds changed where a kernel wrote
too far.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llama_hpc.kernels.cuda import compiler

FOLDER = Path(__file__).parent
GUARD = 256
_KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(|^KERNEL\((\w+)", re.MULTILINE)
_MACRO = re.compile(r"^#define (?:.*\\\n)*.*", re.MULTILINE)
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-march=native", "-fPIC", "-shared", "-w", "-DLLAMA_HPC_EMULATION")


def missing() -> str:
    """Why there can be no emulation here; empty where there can."""
    return "" if shutil.which("g++") else "g++ is not installed"


def build(name: str) -> Path:
    """The library of a ``.cu`` file, compiled unless that was done before."""
    texts = compiler.sources() | {"cuda_emulation.h": (FOLDER / "cuda_emulation.h").read_text()}
    key = hashlib.sha256(repr((sorted(texts.items()), _FLAGS)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"llama_hpc-emulation-{os.getuid()}"
    library = folder / f"{name}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for file, text in texts.items():
            Path(scratch, file).write_text(text)
        names = [a or b for a, b in _KERNEL.findall(_MACRO.sub("", texts[name]))]
        unit = Path(scratch, "unit.cpp")
        unit.write_text(f'#include "{name}"\n' + "".join(f"EXPORT({kernel})\n" for kernel in names))
        job = subprocess.run(["g++", *_FLAGS, f"-I{scratch}", str(unit), "-o", f"{scratch}/library.so"], capture_output=True,
                             text=True, check=False)
        assert job.returncode == 0, job.stderr
        os.replace(f"{scratch}/library.so", library)
    return library


class EmulatedStream:
    """What is to be done in turn. An event is a pair of a stream and how much of it was there when it was recorded."""

    def __init__(self):
        self.added = self.done = 0
        self.actions: deque = deque()

    def add(self, action) -> None:
        self.actions.append(action)
        self.added += 1

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.actions.popleft()()


class EmulatedEvent:
    def __init__(self):
        self.stream, self.until = EmulatedStream(), 0


class EmulatedDevice:
    """``Device`` without one. Threads of a block take turns in ascending or ``descending`` order.

    Nothing is done before somebody waits for it, and then no more than that: what is read too early, or overwritten too early,
    shows. Only from memory that is not pinned, copies are made at once, as CUDA does.
    """

    name, number, architecture, multiprocessors, shared_bytes = "emulated", 0, 90, 4, 227 << 10
    l2_bytes, clock_hz = 1 << 10, 1e9

    def __init__(self, descending: bool = False):
        self.descending, self.launches, self.identity = descending, 0, (os.uname().nodename, os.getpid())
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._guarded: list[np.ndarray] = []
        self._recorded: list | None = None
        self.stream = EmulatedStream()
        self._pinned: list[tuple[int, int]] = []

    def zeros(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.full(size + GUARD + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        memory[start : start + size] = 0
        self._guarded.append(memory[start + size :])
        return memory[start : start + size].view(dtype).reshape(shape)

    def upload(self, array, out=None, stream=None):
        out = self.zeros(array.shape, array.dtype) if out is None else out
        array = array if self._is_pinned(array) else array.copy()
        self._do(lambda: np.copyto(out, array), stream)
        return out

    def download(self, array, out=None):
        out = np.empty(array.shape, array.dtype) if out is None else out
        self._do(lambda: np.copyto(out, array))
        self.synchronize()
        self.check()
        return out

    def fetch(self, array, out, stream=None):
        assert self._is_pinned(out)
        self._do(lambda: np.copyto(out[: len(array)], array), stream)

    def pinned(self, shape, dtype):
        array = np.zeros(shape, dtype)
        self._pinned.append((array.ctypes.data, array.ctypes.data + array.nbytes))
        return array

    def _is_pinned(self, array):
        start = array.ctypes.data
        return not array.nbytes or any(first <= start and start + array.nbytes <= last for first, last in self._pinned)

    def check(self):
        """Raises AssertionError where somebody wrote behind an array."""
        for guard in self._guarded:
            assert (guard == 0xA5).all(), "a kernel wrote behind the end of an array"

    def launch(self, file, kernel, grid, block, *arguments, shared=0):
        if file not in self._libraries:
            self._libraries[file] = ctypes.CDLL(str(build(file)))
        function = getattr(self._libraries[file], f"launch_{kernel}")
        assert shared <= self.shared_bytes and int(np.prod(block)) <= 1024 and all(grid)
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        values = [_value(argument) for argument in arguments]
        self.launches += 1
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

        def run(keep=arguments):
            function(sizes, ctypes.c_size_t(shared), int(self.descending), pointers)
        self._do(run)
        run.values = values

    def compile(self):
        pass

    def synchronize(self):
        self.stream.run(self.stream.added)

    def new_stream(self):
        return EmulatedStream()

    def new_event(self):
        return EmulatedEvent()

    def record(self, event, stream=None):
        event.stream = stream or self.stream
        event.until = event.stream.added

    def follow(self, event, stream=None):
        other, until = event.stream, event.until
        self._do(lambda: other.run(until), stream)

    def passed(self, event):
        """Whoever asks again and again gives the device time."""
        event.stream.run(min(event.until, event.stream.done + 1))
        return event.stream.done >= event.until

    def wait(self, event):
        """What is beside the stream that computes is late: this one is far ahead of it."""
        if event.stream is not self.stream:
            self.synchronize()
        event.stream.run(event.until)

    @contextmanager
    def capture(self):
        self._recorded = recorded = []
        try:
            yield recorded
        finally:
            self._recorded = None

    def replay(self, recorded):
        for action in recorded:
            self.stream.add(action)

    def copy(self, source, target):
        assert source.nbytes == target.nbytes
        self._do(lambda: np.copyto(target, source))

    def seconds(self, run, times=1, lead=None):
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.synchronize()
        return time.perf_counter() - start

    def free_bytes(self):
        return 1 << 30

    def _do(self, action, stream=None):
        if self._recorded is None:
            (stream or self.stream).add(action)
        else:
            self._recorded.append(action)


def _value(argument):
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous or argument.ndim
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, np.generic):
        return np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)
