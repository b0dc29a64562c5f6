"""Products in plain scalar loops, one weight after the other, on one thread: what the kernels' speed-ups are measured from.

Written from the rules of ``numerics`` over weights in canonical order (``formats.Packed.unpack``): the same bits as ``products``,
from code that shares nothing with them.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..formats import Blocks, Packed
from ..numerics import FIXED, GROUP, TINY, UNFIXED
from .functions import half_value
from .memory import address, int8_at
from .simd import fma_scalar, rint

_ZERO, _Q = np.float32(0), np.float32(127)


@intrinsic
def _load(typing_context, values, index):
    """values[index] as int32, in a load of its own: an atomic one, which no compiler joins with others to a vector."""
    def codegen(context, builder, signature, arguments):
        value = builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "monotonic", 1)
        return builder.sext(value, ir.IntType(32))
    return types.int32(values, types.intp), codegen


@njit(cache=True)
def _dot(weights, w, x, at):
    """The exact product of 32 int8 of either."""
    total = np.int32(0)
    for k in range(GROUP):
        total = np.int32(total + np.int32(_load(weights, w + k) * _load(x, at + k)))
    return total


@njit(cache=True)
def _integer_product(values, factors, row_scales, per_block, x, x_scales, out):
    groups = factors.shape[1]
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            total, chain, scale = np.int64(0), _ZERO, row_scales[n] * FIXED
            for group in range(groups):
                dot = _dot(int8_at(values), (n * groups + group) * GROUP, int8_at(x), (m * groups + group) * GROUP)
                chain = fma_scalar(np.float32(dot), factors[n, group] * x_scales[m, group], chain)
                if (group + 1) % per_block == 0 or group + 1 == groups:
                    total, chain = total + np.int64(rint(chain * scale)), _ZERO
            out[m, n] = np.float32(np.float64(total) * UNFIXED)


@njit(cache=True)
def _float_product(weights, halves, block, x, out):
    columns = x.shape[1]
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            total, chain = np.int64(0), _ZERO
            for k in range(columns):
                weight = half_value(halves[n, k]) if halves.size else weights[n, k]
                chain = fma_scalar(weight, x[m, k], chain)
                if (k + 1) % block == 0 or k + 1 == columns:
                    total, chain = total + np.int64(rint(chain * FIXED)), _ZERO
            out[m, n] = np.float32(np.float64(total) * UNFIXED)


def _quantized(x: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """int8 [M, groups, 32] and float32 scales [M, groups] of finite float32 x [M, K]."""
    groups = blocks.pad(x)
    amax = np.abs(groups).max(axis=2)
    small = amax < TINY
    inverse = np.where(small, _ZERO, _Q / np.where(small, np.float32(1), amax))
    return np.rint(groups * inverse[:, :, None]).astype(np.int8), np.where(small, _ZERO, amax / _Q)


class Baseline:
    """x Wᵀ of finite float32 x [M, K] and weights [N, K], packed or plain (float32, or the bits of float16 in uint16).

    Made ready here: ``run`` computes, and returns float32 [M, N]. Values out of range are not looked for.
    """

    def __init__(self, x: np.ndarray, weights: Packed | np.ndarray, block: int):
        packed = isinstance(weights, Packed)
        self.out = np.zeros((len(x), weights.n if packed else len(weights)), np.float32)
        if packed:
            values, factors, row_scales = weights.unpack()
            quantized, x_scales = _quantized(x, weights.blocks)
            self._kept = np.ascontiguousarray(values), quantized
            self._arguments = (address(self._kept[0]), factors, row_scales, weights.blocks.groups_per_block, address(quantized),
                               x_scales, self.out)
            self._function = _integer_product
        else:
            plain, none = np.ascontiguousarray(weights), np.zeros((0, 0), np.float32)
            halves = plain.dtype == np.uint16
            self._arguments = none if halves else plain, plain if halves else none.astype(np.uint16), block, x, self.out
            self._function = _float_product

    def run(self) -> np.ndarray:
        """The product; the first call compiles."""
        self._function(*self._arguments)
        return self.out
