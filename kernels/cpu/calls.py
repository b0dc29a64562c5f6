"""Kernels called on their own: one product, one norm, with nothing prepared. Models build programs instead."""

import numpy as np

from ..numerics import OK
from . import elementwise, products
from .activations import Activation
from .memory import address
from .program import Program
from .weights import Part, Weights
from .workers import ONE_TASK, PANEL, Pool, WorkDistribution

_FUNCTIONS = {"codes": products.codes_product, "bytes": products.bytes_product, "halves": products.halves_product,
              "nibble": products.nibble_product, "f32": products.float32_product, "f16": products.float16_product}
_pools: dict[int, Pool] = {}


def product_function(layout: str):
    """The operation that multiplies weights of a layout."""
    return _FUNCTIONS[layout]


def shared_pool(threads: int) -> Pool:
    """A pool of so many unbound threads, kept for later calls."""
    if threads not in _pools:
        _pools[threads] = Pool(threads)
    return _pools[threads]


def add_product(program: Program, name, activation: Activation, parts: list[Part], layout: str, tokens: np.ndarray, mode: int,
                work: WorkDistribution | None = None, gated: Activation | None = None) -> None:
    """Appends a product of parts (see ``Weights.part``) that share ``layout`` and the activations.

    ``tokens`` int64 [1]: rows of the activations when it runs. ``mode``: one of products.FLOAT, ADD, SUMS, GATED; with GATED the
    parts are gate and up, and ``gated`` takes silu(gate) * up.
    """
    joined = np.concatenate([part.record for part in parts])
    pool, columns, rows = program.pool, activation.values.shape[1], int(joined["rows"].sum())
    pool.need_scratch(products.scratch_bytes())
    work = work or WorkDistribution.for_matmul(rows, columns)
    for record in program.records[::-1]:
        if record.dtype == products.PRODUCT:
            record["following"] = joined["data"][0]
            break
    program.add(name, product_function(layout), products.PRODUCT, work.record(pool.threads, PANEL), tokens=tokens,
                activation=activation.record, parts=joined, count=len(parts), mode=mode, following=joined["data"][0],
                block_panels=products.block_panels(int(joined["tile_bytes"][0])),
                gated=0 if gated is None else address(gated.record), keep=(activation, gated, parts))


def add_quantize(program: Program, name, activation: Activation, tokens: np.ndarray) -> None:
    """Appends the quantisation of rows that are float32 already."""
    program.add(name, elementwise.quantize_operation, elementwise.NORM, ONE_TASK.record(program.pool.threads), rows=tokens,
                target=activation.record, keep=(activation,))


def products_of(x: np.ndarray, weights: Weights, *, pool: Pool | None = None, work: WorkDistribution | None = None,
                mode=products.FLOAT, out: np.ndarray | None = None) -> tuple[int, np.ndarray]:
    """(status, x Wᵀ) for float32 x [M, K]: float32 [M, N], or with mode SUMS int64 multiples of 2**-32; ADD adds to ``out``."""
    x, pool = np.ascontiguousarray(x, np.float32), pool or shared_pool(1)
    out = np.empty((len(x), weights.rows), np.int64 if mode == products.SUMS else np.float32) if out is None else out
    if not len(x):
        return OK, out
    activation = Activation(len(x), x.shape[1], weights.blocks.block, weights.quantized)
    activation.values[:] = x
    program, tokens = Program(pool), np.array([len(x)])
    if weights.quantized:
        add_quantize(program, "x", activation, tokens)
    add_product(program, "product", activation, [weights.part(out)], weights.layout, tokens, mode, work)
    found = program.run()
    return OK if found < 0 else int(program.status[found]), out


def matmul(x: np.ndarray, weights: Weights, out: np.ndarray | None = None, work: WorkDistribution | None = None,
           pool: Pool | None = None) -> np.ndarray:
    """x Wᵀ, float32 [M, N], of float32 x [M, K]. Raises FloatingPointError for values that are not finite or out of range."""
    status, out = products_of(x, weights, pool=pool, work=work, out=out)
    if status:
        raise FloatingPointError(f"the product of {x.shape} activations is not finite, or beyond the range of exact sums")
    return out


def matvec(x: np.ndarray, weights: Weights, out: np.ndarray | None = None, work: WorkDistribution | None = None,
           pool: Pool | None = None) -> np.ndarray:
    """W x, float32 [N], of float32 x [K]. Raises as ``matmul``."""
    return matmul(x[None], weights, None if out is None else out[None], work, pool)[0]
