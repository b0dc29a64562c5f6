"""Weights as the kernels of this process hold them: room for a format, and its bytes."""

import numpy as np

from ..formats import Blocks, Packed
from ..numerics import GROUP
from . import int8_weights, matmul
from .target import kernels

LANES = matmul.LANES


def allocate(weights_format: str, rows: int, blocks: Blocks, codebook=None):
    """Room for ``rows`` rows of weights in ``f32``, ``q8`` or ``q3_5`` (with its codebook), to be given to ``fill``."""
    if weights_format == "f32":
        return matmul.empty_float_weights(rows, blocks.size, blocks.block)
    shape = rows, blocks.groups, blocks.groups_per_block
    if kernels() == "float":
        return matmul.empty_integer_weights(*shape)
    if weights_format == "q3_5" and kernels() == "vbmi":
        return int8_weights.empty_pair_weights(*shape, codebook)
    return int8_weights.empty_byte_weights(*shape, np.uint16 if weights_format == "q8" else np.float32)


def fill(weights, first_row: int, part: np.ndarray | Packed) -> None:
    """Stores float32 rows, or packed ones, as rows first_row … of weights from ``allocate``."""
    if isinstance(weights, matmul.FloatWeights):
        matmul.fill_float(weights, first_row, part)
    elif isinstance(weights, matmul.IntegerWeights):
        matmul.fill_integer(weights, first_row, *part.unpack())
    else:
        weights.fill(first_row, part)


def allocated_bytes(weights_format: str, rows: int, blocks: Blocks) -> int:
    """``nbytes`` of what ``allocate`` would give."""
    rows = -(-rows // LANES) * LANES
    if weights_format == "f32":
        return rows * 4 * (blocks.size + 1)
    if weights_format == "q3_5" and kernels() == "vbmi":
        group = int8_weights.GROUP_CODES / LANES + 0.5
        return int(rows * (blocks.groups * group + 4)) + 2 * int8_weights.CODEBOOK_SIZE
    half = weights_format == "q8" and kernels() != "float"
    return rows * (blocks.groups * (GROUP + (2 if half else 4)) + 4)
