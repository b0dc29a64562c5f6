"""Every kernel compiles, without a device, for the architectures that are supported; errors name file and line."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from llama_hpc.kernels.cuda import compiler

pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
SOURCES = sorted(name for name in compiler.sources() if name.endswith(".cu"))


ARCHITECTURES = 75, 80, 90, 100


@pytest.fixture(scope="module")
def compiled():
    """All kernels for all architectures, two at a time."""
    with ProcessPoolExecutor(2) as pool:
        yield {(name, architecture): pool.submit(compiler.compile_source, name, architecture, use_cache=False)
               for architecture in ARCHITECTURES for name in SOURCES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_compiles(compiled, name, architecture):
    assert compiled[name, architecture].result().startswith(b"\x7fELF")


def test_what_was_compiled_is_kept_until_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_HPC_CUDA_CACHE", str(tmp_path / "cache"))
    first = compiler.compile_source("norm.cu", 90)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"from the cache")
    assert compiler.compile_source("norm.cu", 90) == b"from the cache"
    monkeypatch.setattr(compiler, "_texts", lambda: b"changed")
    assert compiler.compile_source("norm.cu", 90) == first


def test_errors_point_at_the_line(monkeypatch):
    broken = compiler.sources() | {"broken.cu": '#include "numerics.cuh"\n\n__global__ void f() { nothing(); }\n'}
    monkeypatch.setattr(compiler, "sources", lambda: broken)
    with pytest.raises(compiler.CompilationError, match=r"broken\.cu for sm_90:\nbroken\.cu\(3\): error.*nothing"):
        compiler.compile_source("broken.cu", 90, use_cache=False)
