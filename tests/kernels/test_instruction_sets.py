"""One hash over the outputs of all kernels, on every set of instructions that this processor can run.

Each is forced in a process of its own, which prints what Numba compiled for, the kernels that it chose and the registers that
LLVM used, beside the hash.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
from kernel_inputs import FORMATS, kernel_weights, normal, operate, quantized, stored
from kv_caches import Cache, queries
from numba import njit
from numba.core.registry import cpu_target
from test_attention import KV_OF_HEAD, LENGTHS, POSITIONS, SEQUENCES
from test_context_attention import attend as attend_on_ranks
from test_kv_store import Rows

from llama_hpc.kernels.cpu import elementwise, joining, products, sampling, target
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, products_of, shared_pool
from llama_hpc.kernels.cpu.memory import address
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.formats import Blocks, Packed
from llama_hpc.kernels.numerics import OK
from llama_hpc.kernels.sampling import choose, philox

SHAPES = (35, 172, 64), (70, 576, 256), (16, 24, 8)
TOKENS = (*range(1, 10), 33)


def products_in(weights_format):
    """Sums for every mixture of register tiles; then gate and up, with what follows them."""
    for n, k, block in SHAPES:
        part = stored(weights_format, normal((n, k), 1, 0.1), Blocks(k, block))
        if isinstance(part, Packed):
            yield OK, np.frombuffer(part.bytes(), np.uint8)
        weights, x = kernel_weights(weights_format, part, n, Blocks(k, block)), normal((max(TOKENS), k), 2)
        for tokens in TOKENS:
            for threads in (1, 2):
                yield products_of(x[:tokens], weights, pool=shared_pool(threads), mode=products.SUMS)
        yield products_of(x, weights, mode=products.ADD, out=normal((len(x), n), 3))
    n, k = 70, 576
    parts = [kernel_weights(weights_format, stored(weights_format, normal((n, k), seed, 0.1), Blocks(k, 256)), n, Blocks(k, 256))
             for seed in (4, 5)]
    activation, gated = Activation(5, k, 256, parts[0].quantized), Activation(5, n, 64, parts[0].quantized)
    weight, rows, x = normal(k, 6), np.array([5]), normal((5, k), 7) * np.float32([[1], [1e-40], [1e-20], [1e15], [300]])
    yield operate(elementwise.norm_operation, elementwise.NORM, rows=rows, residual=x, stride=k, columns=k, weight=weight,
                  eps=np.array([1e-6]), target=activation.record), activation.values
    program, biased = Program(shared_pool(1)), [part.part(None, normal(n, 8)) for part in parts]
    add_product(program, "gate", activation, biased, parts[0].layout, rows, products.GATED, gated=gated)
    program.run()
    yield int(program.status[0]), gated.values
    if gated.quantized:
        yield from ((OK, array) for array in (*quantized(activation, 5), *quantized(gated, 5)))


def attention_and_the_rest():
    for dtype in (np.uint16, np.float32, np.int8):
        cache = Cache(LENGTHS, 2, 20, dtype).write()
        for window in (0, 300):
            arguments = queries(len(POSITIONS), 20), SEQUENCES, POSITIONS, KV_OF_HEAD, window
            yield cache.attend(*arguments)
            status, found = attend_on_ranks(cache, *arguments, ranks=2, first_parts=[0, 0, 1, 0], room=5)
            yield from ((status, own.values) for _, own in found)
        rows = Rows(20, dtype)
        yield rows.store(normed=True), rows.q
        pools = rows.cache.key_pool, *rows.cache.scale_pools
        yield from ((OK, np.nan_to_num(pool)) for pool in pools if pool is not None)
    sums, residual = np.random.default_rng(0).integers(-2**51, 2**51, (3, 40)), normal((3, 40), 2)
    yield operate(joining.join_operation, joining.JOIN, rows=np.array([3]), columns=40, parts=np.array([address(sums)]), ranks=1,
                  kind=joining.FINISH, target=residual, bias=normal(40), spent=np.zeros(1, np.int64)), residual
    logits, weights = normal(1000) * np.float32(4), np.empty(1000, np.int64)
    maximum, total = sampling.weigh(logits, weights)
    yield OK, np.array([maximum])
    yield OK, np.append(weights, total)
    numbers = [philox((1, 2), (0, i, 0, 0))[0] for i in range(50)]
    yield OK, np.array([choose(logits, 0.8, 50, 0.95, 0.0, number, sampling.weigh) for number in numbers])


def digest(formats) -> str:
    """Of the products in some formats; in all of them, of every kernel."""
    total = hashlib.sha256()
    outputs = [products_in(name) for name in formats] + [attention_and_the_rest()] * (tuple(formats) == FORMATS)
    for status, array in (pair for part in outputs for pair in part):
        assert status == OK and np.isfinite(array).all()
        total.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
    return total.hexdigest()


@njit
def _double(x):
    for i in range(x.shape[0]):
        x[i] += x[i]


def report(*formats) -> None:
    """Prints the processor that Numba compiles for, the kernels, the widest vector registers in code that it made, the hash."""
    _double(np.ones(64, np.float32))
    (assembly,) = _double.inspect_asm().values()
    registers = max(re.findall(r"%([xyz]mm)\d", assembly), default="none")
    print(cpu_target.target_context.codegen()._get_host_cpu_name(), target.kernels(), registers, digest(formats))


@pytest.fixture(scope="module")
def here():
    """The digest of this process, by formats."""
    found = {}
    def get(formats):
        return found.setdefault(formats, digest(formats))
    return get


def other_process(statement, *variables):
    """What another process with these pairs in its environment prints. Its compiled code is kept apart: see ``numba_setup``."""
    start = f"from llama_hpc.runtime.numba_setup import configure; configure(2); from test_instruction_sets import *; {statement}"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_CPU", "LLAMA_HPC_KERNELS"))}
    environment |= dict(variables) | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def printed(request):
    """What ``other_process`` prints for a job, its arguments. The jobs of all tests that are to run are started at once, two at a
    time: each is compiling on one core for most of its time."""
    jobs = {item.callspec.params.get("job"): None for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(2) as pool:
        started = {job: pool.submit(other_process, *job) for job in jobs if job}
        yield lambda job: started[job].result()
        pool.shutdown(cancel_futures=True)


AVX2 = "avx2", "fma", "f16c"
AVX512 = *AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"
# Of those with registers alike only integer products differ: floats and attention are compiled for one of them.
INTEGERS = "q3_5", "q4", "q8"
PROCESSORS = [
    ("cascadelake", "vnni", "zmm", FORMATS, (*AVX512, "avx512vnni")),
    ("skylake-avx512", "avx512", "zmm", INTEGERS, AVX512),
    ("alderlake", "avxvnni", "ymm", INTEGERS, (*AVX2, "avxvnni")),
    ("haswell", "avx2", "ymm", FORMATS, AVX2),
    ("x86-64", "generic", "xmm", FORMATS, ()),
]


def processor_job(name, formats, features):
    """None where this processor cannot stand in for one."""
    if platform.machine() != "x86_64" or not all(llvmlite.binding.get_host_cpu_features().get(f) for f in features):
        return None
    listed = ",".join(f"+{feature}" for feature in features)
    return f"report(*{formats})", ("NUMBA_CPU_NAME", name), ("NUMBA_CPU_FEATURES", listed)


def choice_job(kernels, weights_format):
    """None where this processor uses or lacks these kernels."""
    if kernels == target.kernels() or kernels not in target.possible():
        return None
    return f"report({weights_format!r})", ("LLAMA_HPC_KERNELS", kernels)


@pytest.mark.parametrize("name, kernels, registers, formats, job",
                         [(*row[:4], processor_job(row[0], *row[3:])) for row in PROCESSORS])
def test_other_processors_give_the_same_bits(here, printed, name, kernels, registers, formats, job):
    """Ones that this processor can stand in for, with registers no wider than theirs."""
    if job is None:
        pytest.skip(f"this processor has not the instructions of {name}")
    found = printed(job)
    # What LLVM makes of loops by itself may be narrower: it avoids zmm on the first processors that have it.
    assert found[:2] == [name, kernels] and found[2] <= registers
    assert found[3] == here(formats)


@pytest.mark.parametrize("kernels, weights_format, job", [
    (kernels, weights_format, choice_job(kernels, weights_format))
    for kernels, weights_format in zip(target.KERNELS[1:], ("q3_5", "q4", "q3_5", "q4", "q3_5"), strict=True)])
def test_chosen_kernels_give_the_same_bits(here, printed, kernels, weights_format, job):
    """LLAMA_HPC_KERNELS, on this processor."""
    if job is None:
        pytest.skip(f"this processor uses or lacks the {kernels} kernels")
    found = printed(job)
    assert found[1] == kernels
    assert found[3] == here((weights_format,))


def elsewhere(triple: str) -> None:
    """Prints how often instructions of another machine occur in products compiled for it, without what only x86 has, and what a
    product made so gives here."""
    target.is_x86 = lambda: False
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    machine = llvmlite.binding.Target.from_triple(triple).create_target_machine(opt=3)
    for operation in (products.bytes_product, products.float16_product):
        # Numba's own reference counts have been lowered for x86 already.
        source = operation._compiled._library.get_llvm_str().replace("llvm.x86.atomic.sub.cc.i64", "count")
        assert "llvm.x86" not in source
        module = llvmlite.binding.parse_assembly(re.sub(r"target (triple|datalayout) = .*", "", source))
        module.triple, module.data_layout = triple, str(machine.target_data)
        print(*(len(re.findall(rf"\b{name}\b", machine.emit_assembly(module))) for name in ("mul", "fmla")))
    print(digest(["q3_5"]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere every test does this")
def test_other_architectures_can_compile_the_generic_kernels(here, tmp_path):
    llvmlite.binding.initialize_all_targets()
    try:
        llvmlite.binding.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no back end for aarch64")
    # Not from the cache: code that was loaded has no source.
    *counts, found = other_process("elsewhere('aarch64-linux-gnu')", ("NUMBA_CPU_NAME", "x86-64"), ("NUMBA_CPU_FEATURES", ""),
                                   ("NUMBA_CACHE_DIR", str(tmp_path)))
    assert min(map(int, counts)) > 0
    assert found == here(("q3_5",))
