"""Activations as products read them: float32 rows, and their quantised form for integer weights."""

import numpy as np
from numba.extending import intrinsic

from ..formats import Blocks
from ..numerics import GROUP
from .memory import address, aligned, record, record_pointer
from .simd_int8 import UNIT

# float32 values [rows, stride]; quantised: int8 x, float32 scales and int32 corrections as ``panels`` describes them (x 0: none).
ACTIVATION = record("values", "stride", "columns", "block", "x", "scales", "corrections", "capacity", "per_block")


@intrinsic
def activation_at(typing_context, where):
    """A pointer to ACTIVATION records."""
    return record_pointer(ACTIVATION)


class Activation:
    """Input of products: float32 ``values`` [rows, columns] and, if ``quantized``, room for their quantised form.

    ``block``: k per reduction block. ``record`` is what operations read. ``allocate(shape, dtype)`` makes arrays of zeros.
    """

    def __init__(self, rows: int, columns: int, block: int, quantized: bool, allocate=aligned):
        self.values = allocate((rows, columns), np.float32)
        self.blocks, self.quantized = Blocks(columns, block), quantized
        self.x = self.scales = self.corrections = None
        per_block = self.blocks.groups_per_block
        # No power of two from unit to unit: the units of a few rows lie in different sets of the caches.
        capacity = rows + (3 - rows) % 16
        if quantized:
            units = max(1, -(-self.blocks.groups // (UNIT // per_block * per_block)))
            self.x = allocate((units, capacity, UNIT * GROUP), np.int8)
            self.scales = allocate((units, capacity, UNIT), np.float32)
            self.corrections = allocate((units, capacity, UNIT), np.int32)
        self.record = np.array([(address(self.values), columns, columns, block, address(self.x), address(self.scales),
                                 address(self.corrections), capacity, per_block)], ACTIVATION)

    def by_rows(self) -> list[np.ndarray]:
        """What products read, as arrays [rows, …]."""
        if not self.quantized:
            return [self.values]
        return [array.swapaxes(0, 1) for array in (self.x, self.scales, self.corrections)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.values, self.x, self.scales, self.corrections) if array is not None)
