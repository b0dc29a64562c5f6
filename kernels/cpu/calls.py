"""Kernels called on their own: one product, one norm, with nothing prepared. Models build programs instead."""

import numpy as np

from .. import attention_inputs as inputs
from ..formats import Blocks
from ..numerics import BLOCK, OK
from . import attention as paged
from . import elementwise, products, quantize
from .activations import Activation
from .memory import address
from .program import Program
from .weights import Part, Weights, allocate, fill
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
    if x.ndim != 2 or x.shape[1] != weights.blocks.size or (out is not None and out.shape != (len(x), weights.rows)):
        raise ValueError(f"x of shape {x.shape} or the result does not fit weights [{weights.rows}, {weights.blocks.size}]")
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


def pack_weights(weights: np.ndarray | Weights, weights_format: str = "f32", block: int = BLOCK) -> Weights:
    """float32 weights [outputs, inputs] as kernels hold them, in ``f32``, ``f16``, ``q8`` or ``q4``; packed ones as they are.

    ``block``: inputs of a reduction block. Raises ValueError for another format or shape, and values that the format cannot hold.
    """
    if isinstance(weights, Weights):
        return weights
    plain = np.ascontiguousarray(weights, np.float32)
    if plain.ndim != 2 or weights_format not in ("f32", "f16", "q8", "q4"):
        raise ValueError(f"weights [outputs, inputs] in f32, f16, q8 or q4 are needed, not {plain.shape} in {weights_format}")
    blocks = Blocks(plain.shape[1], block)
    if weights_format == "f16":
        plain = quantize.quantize_f16(plain)
    elif weights_format != "f32":
        plain = {"q8": quantize.quantize_q8, "q4": quantize.quantize_q4}[weights_format](plain, blocks)
    packed = allocate(weights_format, len(weights), blocks)
    fill(packed, 0, plain)
    return packed


def matmul(x: np.ndarray, weights: np.ndarray | Weights, out: np.ndarray | None = None, work: WorkDistribution | None = None,
           pool: Pool | None = None) -> np.ndarray:
    """x Wᵀ, float32 [M, N], of float32 x [M, K] and W [N, K], packed or not (see ``pack_weights``).

    Raises FloatingPointError for values that are not finite or out of range.
    """
    status, out = products_of(x, pack_weights(weights), pool=pool, work=work, out=out)
    if status:
        raise FloatingPointError(f"the product of {x.shape} activations is not finite, or beyond the range of exact sums")
    return out


def matvec(x: np.ndarray, weights: np.ndarray | Weights, out: np.ndarray | None = None, work: WorkDistribution | None = None,
           pool: Pool | None = None) -> np.ndarray:
    """W x, float32 [N], of float32 x [K]. Raises as ``matmul``."""
    return matmul(x[None], weights, None if out is None else out[None], work, pool)[0]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, window: int = 0, scale: float | None = None,
              pool: Pool | None = None) -> np.ndarray:
    """softmax(q kᵀ scale) v, float32 [rows, heads, head_dim], with the bits of a model's attention over the same keys and values.

    q [rows, heads, head_dim] are the last ``rows`` positions of k and v [positions, kv_heads, head_dim]; consecutive query heads
    share a KV head. ``causal``: a row sees the positions up to its own, of these the last ``window`` (0: all), else each row sees
    all. ``scale``: by default head_dim**-0.5. k and v in float16 are read as such, anything else as float32.

    Raises ValueError for shapes that do not fit, FloatingPointError for values that are not finite or out of range.
    """
    inputs.check(q, k, v, causal, window)
    (rows, heads, head_dim), (positions, kv_heads, _), half = q.shape, k.shape, k.dtype == v.dtype == np.float16
    pool = pool or shared_pool(1)
    keys, values = inputs.in_pages(k, v)
    target = Activation(rows, heads * head_dim, min(head_dim, BLOCK), False)
    where = inputs.positions_of(q, k, causal)
    slots, runs, table = np.zeros(rows, np.int32), np.zeros((rows, 2), np.int32), np.arange(len(keys), dtype=np.int32)
    pool.need_scratch(paged.scratch_bytes(positions, head_dim, heads // kv_heads))
    program, flat = Program(pool), np.ascontiguousarray(q, np.float32).reshape(rows, heads * head_dim)
    scales = np.array([inputs.default_scale(head_dim) if scale is None else scale], np.float32)
    work = WorkDistribution.for_attention(kv_heads, positions).record(pool.threads)
    program.add("attention", paged.attention_operation if half else paged.float32_attention_operation, paged.ATTENTION, work,
                runs=runs, run_count=np.array([paged.runs_of(slots, where, rows, runs)]), q=flat, q_stride=heads * head_dim,
                keys=keys, values=values, pages=table, pages_stride=len(table), sequences=slots, positions=where,
                head_starts=np.arange(0, heads + 1, heads // kv_heads, dtype=np.int32), kv_heads=kv_heads, head_dim=head_dim,
                window=window, scale=scales, target=target.record, scratch=0, keep=(target,))
    if rows and program.run() >= 0:
        raise FloatingPointError("attention: a value is not finite, or beyond the range of exact sums")
    return target.values.reshape(q.shape)
