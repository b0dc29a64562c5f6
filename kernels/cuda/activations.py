"""Activations on a device, and what makes them: RMS norm, quantisation. See norm.cu."""

import numpy as np

from ..formats import Blocks
from ..numerics import GROUP

_THREADS = 256


class Activation:
    """Input of products on a device: float32 ``values`` [rows, columns] and, if ``quantized``, ``x`` int8 [rows, groups, 32] and
    ``scales`` float32 [rows, groups] (else None). ``block``: k per reduction block."""

    def __init__(self, device, rows: int, columns: int, block: int, quantized: bool):
        self.blocks, self.quantized = Blocks(columns, block), quantized
        self.values = device.zeros((rows, columns), np.float32)
        self.x = self.scales = None
        if quantized:
            self.x = device.zeros((rows, self.blocks.groups, GROUP), np.int8)
            self.scales = device.zeros((rows, self.blocks.groups), np.float32)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.values, self.x, self.scales) if array is not None)


def rms_norm(device, residual, weight, eps: float, target: Activation, rows, most: int, status, selected=None) -> None:
    """target = RMS norm of rows of ``residual`` float32 [.., columns] (those ``selected``, int32, or the first ones), quantised
    if the target is.

    ``rows``: int32 [1] on the device, at most ``most``. ``status``: int32 [1], which takes NOT_FINITE.
    """
    device.launch("norm.cu", "norm_rows", (most,), (_THREADS,), residual, selected, rows, target.blocks.size, weight,
                  np.float64(eps), target.values, target.x, target.scales, target.blocks.block, status)


def quantize_rows(device, target: Activation, rows, most: int, status) -> None:
    """Quantises the values of ``target``."""
    device.launch("norm.cu", "quantize_rows", (most,), (_THREADS,), target.values, rows, target.blocks.size, target.x,
                  target.scales, target.blocks.block, status)
