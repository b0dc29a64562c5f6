"""Products on a device: y = x Wᵀ of activations and weights, with what follows them fused in. See products.cu."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats import Blocks
from ..numerics import GROUP
from .activations import Activation
from .weights import TILE, UNIT, DeviceWeights, groups_per_unit

FLOAT, ADD, SUMS, GATED = range(4)
FEW = 8                         # tokens that one launch of the kernels for few tokens multiplies
MANY = 32                       # up to so many tokens, launches for few come to less
PARTS = 3                       # of a product at most
_ROW_THREADS = 256
_TABLE_BYTES = 32768            # of shared memory for looking up codes of a tensor in q3_5
_MANY_TOKENS, _MANY_THREADS = 128, 256
# Shared memory that a block may have, by architecture.
_SHARED_BYTES, _LEAST_SHARED = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}, 64 << 10
# Blocks of a multiprocessor and threads of a block, of kernels for 1, 2, 4 and 8 tokens: as their registers allow.
_SHAPES = {"integers": ((1, 512), (1, 512), (1, 512), (1, 384)), "floats": ((4, 256), (4, 256), (3, 256), (2, 256))}


@dataclass(frozen=True)
class Part:
    """One matrix of a product: its weights, where its outputs go ([rows, outputs], None with GATED), and their bias or None."""

    weights: DeviceWeights
    out: Any = None
    bias: Any = None

    @property
    def arguments(self) -> tuple:
        w = self.weights
        return w.data, w.codebook, w.row_scales, self.bias, self.out, w.rows


_NOTHING = (None,) * 5 + (0,)


class Scratch:
    """Where products of few tokens join their sums, for up to ``outputs`` outputs of all parts of a product together.

    It is zero between products, so those that run one after the other share it.
    """

    def __init__(self, device, outputs: int):
        self.tiles = -(-outputs // TILE) + PARTS
        self.sums = device.zeros((self.tiles, FEW, TILE), np.int64)
        self.arrived = device.zeros((self.tiles,), np.int32)

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.arrived.nbytes


def product(device, activation: Activation, parts: list[Part], rows, most: int, mode: int, status,
            gated: Activation | None = None, scratch: Scratch | None = None) -> None:
    """Outputs of each part for rows of the activations, parts of one format: float32 x Wᵀ + bias (FLOAT), or that added to the
    float32 there (ADD), or int64 sums, multiples of 2**-32 (SUMS).

    With GATED the parts are gate and up, and ``gated`` takes silu(gate) * up, quantised if it is; it has the outputs as columns.
    ``rows``: int32 [1] on the device, at most ``most``. ``status``: int32 [1], which takes NOT_FINITE and OUT_OF_RANGE.
    """
    _check(activation, parts, mode, gated)
    if scratch is None or scratch.tiles < sum(part.weights.tiles for part in parts):
        raise ValueError(f"a product of {sum(part.weights.rows for part in parts)} outputs needs a Scratch for them")
    shared = _shared_for_many(parts[0].weights, mode)
    if most > MANY and parts[0].weights.quantized and shared <= _SHARED_BYTES.get(device.architecture, _LEAST_SHARED):
        _many(device, activation, parts, rows, most, mode, status, gated, shared)
    else:
        for first in range(0, most, FEW):
            _few(device, activation, parts, rows, first, min(FEW, most - first), mode, status, gated, scratch)


def _check(activation: Activation, parts: list[Part], mode: int, gated: Activation | None) -> None:
    first = parts[0].weights
    if any(part.weights.format != first.format or part.weights.blocks != activation.blocks for part in parts):
        raise ValueError("the parts of a product have one format, and the reduction blocks of its activations")
    if first.quantized and not activation.quantized:
        raise ValueError("quantised weights multiply quantised activations")
    if len(parts) > PARTS or (mode == GATED and (len(parts) != 2 or len({part.weights.rows for part in parts}) > 1)):
        raise ValueError(f"a product has up to {PARTS} parts, and with GATED two of one size")
    if mode == GATED and (gated.blocks.size != first.rows or (gated.quantized and gated.blocks.block % GROUP)):
        raise ValueError(f"gated activations of {gated.blocks.size} columns in blocks of {gated.blocks.block} do not take "
                         f"{first.rows} outputs in whole groups")


def _few(device, activation, parts, rows, first, count, mode, status, gated, scratch) -> None:
    """Multiplies ``count`` tokens from ``first`` on: the units of all tiles are dealt out over the device."""
    weights = parts[0].weights
    variant = (count - 1).bit_length()
    blocks, threads = _SHAPES["integers" if weights.quantized else "floats"][variant]
    work = [part.weights.tiles * part.weights.units for part in parts]
    starts = _starts(work, mode, blocks * device.multiprocessors, threads // TILE)
    if weights.quantized:
        blocks = activation.blocks
        file, inputs = "products.cu", (activation.x, activation.scales, blocks.groups, groups_per_unit(blocks), _ends(blocks))
    else:
        file, inputs = "products_float.cu", (activation.values, activation.blocks.size, activation.blocks.block)
    device.launch(file, f"{weights.format}_for_{1 << variant}", (starts[2],), (threads,), *_arguments(parts, starts, mode, gated),
                  scratch.sums, scratch.arrived, rows, first, status, *inputs, shared=_table_bytes(weights, mode))


def _many(device, activation, parts, rows, most, mode, status, gated, shared) -> None:
    """Multiplies all tokens: a block has two tiles of 32 rows and some tokens."""
    weights, blocks, ends = parts[0].weights, activation.blocks, []
    for part in parts:
        ends.append((part.weights.tiles if mode == GATED else -(-part.weights.tiles // 2)) + (ends[-1] if ends else 0))
    starts = [ends[0]] * PARTS if mode == GATED else (ends + [ends[-1]] * PARTS)[:PARTS]
    device.launch("products_many.cu", f"{weights.format}_for_many", (-(-most // _MANY_TOKENS), starts[2]), (_MANY_THREADS,),
                  *_arguments(parts, starts, mode, gated), rows, status, activation.x, activation.scales, blocks.groups,
                  blocks.groups_per_block, groups_per_unit(blocks), shared=shared)


def _shared_for_many(weights: DeviceWeights, mode: int) -> int:
    """Shared memory of a block: tables, a unit of both tiles, activations of two units, fragments, factors, scales."""
    raw = 2 * weights.data.nbytes // (weights.tiles * weights.units)
    work = raw + 2 * _MANY_TOKENS * UNIT * GROUP + 2 * TILE * UNIT * (GROUP + 4) + 4 * _MANY_TOKENS * UNIT
    return _table_bytes(weights, mode) + work


def _arguments(parts: list[Part], starts, mode: int, gated: Activation | None) -> tuple:
    """What kernels take first."""
    given = [part.arguments for part in parts] + [_NOTHING] * (PARTS - len(parts))
    target = (None, None, None, 0, 0) if gated is None else (gated.values, gated.x, gated.scales, gated.blocks.size,
                                                             gated.blocks.block)
    return *given[0], *given[1], *given[2], starts[0], starts[1], mode, *target


def _table_bytes(weights: DeviceWeights, mode: int) -> int:
    return _TABLE_BYTES * (2 if mode == GATED else 1) if weights.format == "q3_5" else 0


def _ends(blocks: Blocks) -> int:
    """Bit j says that group j of a unit ends a reduction block."""
    return sum(1 << j for j in range(groups_per_unit(blocks)) if (j + 1) % blocks.groups_per_block == 0)


def _starts(work: list[int], mode: int, blocks: int, warps: int) -> tuple[int, int, int]:
    """Where the blocks of the second and third part begin, and how many there are: in proportion to the work, and not more than
    have any."""
    if mode == GATED:
        work = [sum(work)]
    total, ends = sum(work), []
    for units in work:
        share = max(1, min(round(blocks * units / total), -(-units // warps)))
        ends.append(share + (ends[-1] if ends else 0))
    return (*ends, *[ends[-1]] * (PARTS - len(ends)))


def finish(device, sums, rows, most: int, residual, bias, status) -> None:
    """residual += float32(sums * 2**-32) + bias (or None), for int64 sums of [.., columns] that were joined over ranks."""
    device.launch("embedding.cu", "finish_rows", (most,), (_ROW_THREADS,), sums, rows, residual.shape[1], residual, bias, status)


def embedding(device, table: DeviceWeights, tokens, first: int, held: int, rows, most: int, out) -> None:
    """out float32 [.., columns]: row tokens[r] - first of a table in q8, q4, f16 or f32, zeros where it is none of ``held``.

    ``tokens``: int32 on the device, as many as ``rows`` int32 [1] says, at most ``most``.
    """
    if table.format not in ("q8", "q4", "f16", "f32"):
        raise ValueError(f"tables are kept in q8, q4, f16 or f32, not in {table.format}")
    device.launch("embedding.cu", f"embedding_{table.format}", (most,), (_ROW_THREADS,), table.data, tokens, first, held, rows,
                  table.blocks.size, table.blocks.block, out)
