"""One hash over the outputs of all kernels, here and on other instruction sets.

Run as a program, it prints the target that Numba compiled for, which vector registers that brought, and the hash.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys

import llvmlite.binding
import numpy as np
import pytest
from kernel_inputs import Cache, normal, product
from numba import njit
from numba.core.registry import cpu_target

from llama_hpc.kernels.cpu import elementwise, matmul, sampling
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import OK, rope_table
from llama_hpc.kernels.sampling import choose, philox


def outputs():
    """Status and output of every kernel on fixed inputs: float16 and float32, register tiles of 8 tokens and of 1."""
    for kind in ("float", "integer"):
        x, scales, weights, sums = product(kind, 40, 288, 64, tokens=11)
        yield matmul.matmul(x, scales, weights, sums, 11), sums
        out, bias = normal((11, 40), 3), normal(40, 4)
        yield elementwise.finish_add(sums, bias, out, 11), out
        yield elementwise.finish(sums, bias, out, 11), out
        rows = np.empty((3, 288), np.float32)
        arguments = 288, np.array([3, 39, 40], np.int32), 1, 38, rows, 3
        if kind == "float":
            yield elementwise.float_embedding(weights.values, *arguments), rows
        else:
            yield elementwise.integer_embedding(weights.values, weights.factors, weights.row_scales, *arguments), rows
    for dtype in (np.uint16, np.float32):
        cache = Cache([40, 530], 2, 20, dtype).write()
        for window in (0, 100):
            yield cache.attend(normal((4, 60)), [0, 1, 1, 1], [39, 5, 256, 529], (0, 1, 1), window)
    blocks, cosines_sines = Blocks(172, 64), rope_table(np.arange(1, 11, dtype=np.uint64) << np.uint64(50), 300)
    x = normal((5, 172)) * np.float32([[1], [1e-40], [1e-20], [1e20], [300]])
    out, scales = np.empty((5, blocks.padded), np.float32), np.empty((5, blocks.groups), np.float32)
    yield elementwise.quantize_rows(x, 64, out, scales, 5), out
    yield OK, scales
    yield elementwise.rms_norm(x, normal(172, 1), 1e-6, out := np.empty_like(x), 5), out
    yield elementwise.silu_multiply(normal((5, 172), 2) * np.float32(30), x, out := np.empty_like(x), 5), out
    heads = normal((5, 120))
    yield elementwise.rope(heads, *cosines_sines, np.array([0, 1, 17, 256, 299], np.int32), 5), heads
    x = np.ldexp(normal((5, 172)), np.arange(-30, 13, dtype=np.int32).repeat(4)).astype(np.float32)
    yield elementwise.to_half(x, half := np.empty(x.shape, np.uint16), 5), half
    logits, weights = normal(1000) * np.float32(4), np.empty(1000, np.int64)
    maximum, total = sampling.weigh(logits, weights)
    yield OK, np.array([maximum])
    yield OK, np.append(weights, total)
    tokens = [choose(logits, 0.8, 50, 0.95, philox((1, 2), (0, i, 0, 0))[0], sampling.weigh) for i in range(50)]
    yield OK, np.array(tokens)


def digest() -> str:
    total = hashlib.sha256()
    for status, array in outputs():
        assert status == OK and np.isfinite(array).all()
        total.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
    return total.hexdigest()


@njit
def _double(x):
    for i in range(x.shape[0]):
        x[i] += x[i]


def target() -> tuple[str, str]:
    """The processor that Numba compiles for, and the widest vector registers in code that it made: xmm, ymm or zmm."""
    _double(np.ones(64, np.float32))
    (assembly,) = _double.inspect_asm().values()
    return cpu_target.target_context.codegen()._get_host_cpu_name(), max(re.findall(r"%([xyz]mm)\d", assembly))


def supported(*features):
    return platform.machine() == "x86_64" and all(llvmlite.binding.get_host_cpu_features().get(f) for f in features)


@pytest.mark.parametrize("name, registers, features", [("x86-64", "xmm", ["sse2"]),
                                                       ("haswell", "ymm", ["avx2", "fma", "bmi2"])])
def test_instruction_set_changes_nothing(name, registers, features):
    if not supported(*features):
        pytest.skip(f"this processor is not {name}")
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, registers, digest()]


if __name__ == "__main__":
    print(*target(), digest())
