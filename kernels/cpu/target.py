"""Which kernels this process runs: chosen once from what Numba compiles for, never from the bare CPU.

``vbmi``: AVX-512 with VNNI and VBMI (Ice Lake, Sapphire Rapids, Zen 4 and 5): int8 products, ``q3_5`` read as 7-bit codes.
``vnni``: AVX-512 with VNNI (Cascade Lake): int8 products from bytes. ``float``: any other target: exact integer dot products in
float32 lanes of whatever width there is. All give the same bits. LLAMA_HPC_KERNELS names one of them to override the choice.
"""

import os
from functools import cache

KERNELS = ("vbmi", "vnni", "float")
_VNNI = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
_NEEDED = {"vbmi": (*_VNNI, "avx512vbmi"), "vnni": _VNNI}


def features() -> frozenset[str]:
    """Features of the target that Numba compiles for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included)."""
    from numba.core.registry import cpu_target
    listed = cpu_target.target_context.codegen()._get_host_cpu_features()
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


@cache
def kernels() -> str:
    """The kernels of this process. Raises ValueError where LLAMA_HPC_KERNELS asks for what the target lacks."""
    present = features()
    able = [name for name in KERNELS if present.issuperset(_NEEDED.get(name, ()))]
    asked = os.environ.get("LLAMA_HPC_KERNELS") or able[0]
    if asked not in able:
        raise ValueError(f"LLAMA_HPC_KERNELS={asked} is not possible here; this CPU can run {', '.join(able)}")
    return asked
