"""Which instructions this process computes with: chosen once from what Numba compiles for, never from the bare CPU.

``vbmi``     AVX-512 with VNNI and VBMI (Ice Lake, Sapphire Rapids, Zen 4 and 5): ``q3_5`` is read as 7-bit codes.
``vnni``     AVX-512 with VNNI (Cascade Lake): one instruction for four int8 products; ``q3_5`` is held as bytes, here and below.
``avx512``   AVX-512 (Skylake): int8 products through 16-bit ones.
``avxvnni``  AVX2 with AVX-VNNI (Alder Lake and its like).
``avx2``     AVX2 (Haswell, Zen 1 to 3).
``generic``  anything else that LLVM has a back end for.

All give the same bits. LLAMA_HPC_KERNELS names one of them, among those that the CPU can run, to override the choice.
"""

import os
from functools import cache

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_NEEDED = {
    "vbmi": (*_AVX512, "avx512vnni", "avx512vbmi"),
    "vnni": (*_AVX512, "avx512vnni"),
    "avx512": _AVX512,
    "avxvnni": (*_AVX2, "avxvnni"),
    "avx2": _AVX2,
    "generic": (),
}
KERNELS = tuple(_NEEDED)


def features() -> frozenset[str]:
    """Features of the target that Numba compiles for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included)."""
    from numba.core.registry import cpu_target
    listed = cpu_target.target_context.codegen()._get_host_cpu_features()
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


def possible() -> list[str]:
    """The kernels that the target can run, best first."""
    present = features()
    return [name for name in KERNELS if present.issuperset(_NEEDED[name])]


@cache
def kernels() -> str:
    """The kernels of this process. Raises ValueError where LLAMA_HPC_KERNELS asks for what the target lacks."""
    able = possible()
    asked = os.environ.get("LLAMA_HPC_KERNELS") or able[0]
    if asked not in able:
        raise ValueError(f"LLAMA_HPC_KERNELS={asked} is not possible here; this CPU can run {', '.join(able)}")
    return asked


def vector_bits() -> int:
    """Bits of a vector register that the kernels use."""
    return {"vbmi": 512, "vnni": 512, "avx512": 512, "avxvnni": 256, "avx2": 256}.get(kernels(), 128)


@cache
def is_x86() -> bool:
    """Whether LLVM compiles for x86, where every CPU has SSE2."""
    import llvmlite.binding
    return llvmlite.binding.get_default_triple().startswith(("x86_64", "i686"))


@cache
def converts_halves() -> bool:
    """Whether the target converts float16 to float32 by an instruction."""
    return kernels() != "generic"
