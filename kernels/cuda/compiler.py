"""CUDA C++ to machine code by NVRTC, once per node and architecture: what was compiled is kept on the disk.

Works without a device and without a driver.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",
           "--device-as-default-execution-space", "--generate-line-info")
OLDEST = 75                     # sm_75: the first architecture that NVRTC of CUDA 13 knows
_FOLDER = "LLAMA_HPC_CUDA_CACHE"


class CompilationError(RuntimeError):
    """What NVRTC says of a source, with its lines."""


def sources() -> dict[str, str]:
    """All files ``*.cu`` and ``*.cuh`` of this folder by name."""
    return {file.name: file.read_text() for file in resources.files(__package__).iterdir() if file.name.endswith((".cu", ".cuh"))}


def cache_folder() -> Path:
    """Where compiled kernels are kept: $LLAMA_HPC_CUDA_CACHE, or a folder of this user's in the node's temporary folder."""
    given = os.environ.get(_FOLDER)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"llama_hpc-cuda-{os.getuid()}"


def compile_source(name: str, architecture: int, use_cache: bool = True) -> bytes:
    """The cubin of ``name``, such as norm.cu, for an architecture (90: sm_90). Raises CompilationError."""
    from cupy_backends.cuda.libs import nvrtc
    files = sources()
    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS)
    path = cache_folder() / f"{name}-{architecture}-{_fingerprint(name, options, nvrtc.getVersion())}.cubin"
    if use_cache:
        with suppress(OSError):
            return path.read_bytes()
    headers = {header.encode(): text.encode() for header, text in files.items() if header.endswith(".cuh")}
    program = nvrtc.createProgram(files[name], name, tuple(headers.values()), tuple(headers))
    try:
        nvrtc.compileProgram(program, options)
        cubin = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise CompilationError(f"{name} for sm_{architecture}:\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
    if use_cache:
        with suppress(OSError):
            _keep(path, cubin)
    return cubin


@cache
def _texts() -> bytes:
    return "\0".join(f"{name}\0{text}" for name, text in sorted(sources().items())).encode()


def _fingerprint(name: str, options: tuple[str, ...], version: tuple[int, int]) -> str:
    return hashlib.sha256(repr((name, options, version)).encode() + _texts()).hexdigest()[:16]


def _keep(path: Path, cubin: bytes) -> None:
    """Whole or not at all: other ranks of the node may be about to do the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
