"""Dense products by cuBLAS, through CuPy, for comparison: bfloat16, and 8-bit integers."""

from dataclasses import dataclass

import numpy as np

from llama_hpc.bench.device_probes import LEAST_SECONDS, copies_for
from llama_hpc.kernels.cuda.random_weights import repeated

_TRANSPOSED, _PLAIN = 1, 0                      # cublasOperation_t
_DEFAULT_ALGORITHM = 99                         # CUBLAS_GEMM_DEFAULT_TENSOR_OP
_BANK = 1 << 22
_LAUNCHES = 500                                 # that a queue surely holds
_LEADS = 8                                      # copies that the device makes while these are launched


@dataclass(frozen=True)
class _Kind:
    """A type of numbers: cudaDataType of inputs and of outputs, cublasComputeType, bytes, type of the two factors."""

    inputs: int
    outputs: int
    compute: int
    width: int
    output_width: int
    factor: type


KINDS = {"bf16": _Kind(14, 14, 68, 2, 2, np.float32), "int8": _Kind(3, 10, 72, 1, 4, np.int32)}


def operations_per_second(device, kind: str, columns: int, rows: int, tokens: int, lead) -> float:
    """Of x Wᵀ with random x [tokens, columns] and W [rows, columns], as many W as exceed the cache; 0 where CuPy has no cuBLAS,
    or that has no such product. ``lead`` keeps the device busy (see ``Device.seconds``)."""
    kind = KINDS[kind]
    if not hasattr(device, "stream"):       # an emulated one
        return 0.0
    try:
        import cupy
        from cupy_backends.cuda.libs import cublas
        handle = cupy.cuda.device.get_cublas_handle()
    except Exception:           # CuPy raises whatever the missing library leads to
        return 0.0
    x, out = repeated(device, _random(kind), tokens * columns * kind.width), device.zeros((tokens * rows * kind.output_width,),
                                                                                         np.uint8)
    size = rows * columns * kind.width
    matrices = [repeated(device, _random(kind), size) for _ in range(min(copies_for(device, size), _LAUNCHES))]
    one, zero = np.ones(1, kind.factor), np.zeros(1, kind.factor)

    def run() -> None:
        # In the columns-first order of cuBLAS this is outᵀ = W xᵀ.
        for w in matrices:
            cublas.gemmEx(handle, _TRANSPOSED, _PLAIN, rows, tokens, columns, one.ctypes.data, w.data.ptr, kind.inputs, columns,
                          x.data.ptr, kind.inputs, columns, zero.ctypes.data, out.data.ptr, kind.outputs, rows, kind.compute,
                          _DEFAULT_ALGORITHM)
    with device.stream:
        try:
            run()
        except cublas.CUBLASError:
            return 0.0
        first = device.seconds(run)
        times = max(1, min(round(LEAST_SECONDS / first), _LAUNCHES // len(matrices)))
        # CuPy does not let graphs take cuBLAS's products: without a start in advance small ones would wait for the host.
        seconds = device.seconds(run, times, lambda: [lead() for _ in range(_LEADS)]) / (times * len(matrices))
    return 2.0 * tokens * rows * columns / seconds


def _random(kind: _Kind) -> np.ndarray:
    rng = np.random.default_rng(2)
    if kind.width == 1:
        return rng.integers(-127, 128, _BANK, np.int8)
    return (rng.standard_normal(_BANK, np.float32).view(np.uint32) >> 16).astype(np.uint16)
