"""Products of arrays that several ranks share, without a model: as its layers compute them, so with the same bits on any number.

``weights`` are a rank's share, float32 [outputs, inputs] or packed ones (``pack_weights``). Without a communicator shares can be
computed one after the other in one process: ``partial`` gives int64 multiples of 2**-32, which ``others`` takes. Arrays that do
not fit each other raise UsageError.
"""

from contextlib import contextmanager, nullcontext

import numpy as np

from llama_hpc.errors import NumericsError, UsageError
from llama_hpc.kernels.cpu import products
from llama_hpc.kernels.cpu.activations import Activation
from llama_hpc.kernels.cpu.calls import add_product, add_quantize, pack_weights, products_of, shared_pool
from llama_hpc.kernels.cpu.program import Program
from llama_hpc.kernels.cpu.weights import Weights
from llama_hpc.kernels.cpu.workers import Pool
from llama_hpc.kernels.numerics import FIXED, OUTPUT_LIMIT, UNFIXED
from llama_hpc.runtime.abort import agreed


def all_reduce_sum(array: np.ndarray, comm=None, out: np.ndarray | None = None) -> np.ndarray:
    """The sum over all ranks of ``comm`` (None: this one alone), on each of them. Collective; exact, so in any order the same.

    ``array`` is int64, or float32 [...], of which multiples of 2**-32 are added. ``out`` takes the result and may be ``array``.
    Raises TypeError for another type, NumericsError for floats that are not finite or 2**20 or more.
    """
    array = np.asarray(array, order="C")
    if array.dtype not in (np.int64, np.float32):
        raise TypeError(f"all_reduce_sum adds int64 or float32, not {array.dtype}")
    if array.dtype == np.int64:
        sums = np.array(array)
    else:
        with _agreed(comm):
            if not (np.abs(array) < OUTPUT_LIMIT).all():
                raise NumericsError("all_reduce_sum: a value is not finite, or 2**20 or more")
            sums = np.rint(array.astype(np.float64) * FIXED).astype(np.int64)
    if comm is not None and comm.size > 1:
        from mpi4py import MPI
        comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)
    found = sums if array.dtype == np.int64 else (sums * UNFIXED).astype(np.float32)
    if out is None:
        return found
    out[...] = found
    return out


def column_parallel_linear(x: np.ndarray, weights: np.ndarray | Weights, bias: np.ndarray | None = None, comm=None,
                           gather: bool = False, pool: Pool | None = None) -> np.ndarray:
    """x Wᵀ + b for this rank's outputs, float32 [M, own], of float32 x [M, inputs]; with ``gather`` those of all ranks, in order.

    ``bias`` float32 [own]. Collective over ``comm`` (None: no other rank). Raises NumericsError, on all ranks, for values that
    are not finite or out of range.
    """
    with _agreed(comm):
        out = _product(x, pack_weights(weights), products.FLOAT, pool)
        if bias is not None:
            out += bias
    if not gather or comm is None or comm.size == 1:
        return out
    sizes = comm.allgather(out.shape[1])
    counts = [len(out) * size for size in sizes]
    gathered = np.empty(sum(counts), np.float32)
    comm.Allgatherv(out, [gathered, counts])
    pieces = np.split(gathered, np.cumsum(counts)[:-1])
    return np.concatenate([piece.reshape(len(out), size) for piece, size in zip(pieces, sizes, strict=True)], axis=1)


def row_parallel_linear(x: np.ndarray, weights: np.ndarray | Weights, bias: np.ndarray | None = None, comm=None, *,
                        partial: bool = False, others: np.ndarray | None = None, pool: Pool | None = None) -> np.ndarray:
    """x Wᵀ + b, float32 [M, outputs], on every rank, where each has some of the inputs: float32 x [M, own], W [outputs, own].

    Inputs are to be dealt in whole reduction blocks (256, or that of packed weights). ``bias`` float32 [outputs] is added once.
    ``partial``: returns int64 sums [M, outputs] without bias, of this rank alone; ``others``: such sums, added to the own ones.
    Collective over ``comm`` (None: no other rank) unless ``partial``. Raises NumericsError, on all ranks, as above.
    """
    with _agreed(None if partial else comm):
        sums = _product(x, pack_weights(weights), products.SUMS, pool)
    return _joined(sums, bias, comm, partial, others)


def mlp_tensor_parallel(x: np.ndarray, gate: np.ndarray | Weights, up: np.ndarray | Weights, down: np.ndarray | Weights,
                        comm=None, *, partial: bool = False, others: np.ndarray | None = None,
                        pool: Pool | None = None) -> np.ndarray:
    """down(silu(gate(x)) * up(x)), float32 [M, outputs] on every rank, of float32 x [M, inputs], the same on every rank.

    gate, up [own, inputs] and down [outputs, own]: a rank's share of the intermediate channels, whole reduction blocks of down.
    ``comm``, ``partial``, ``others`` and errors as in ``row_parallel_linear``.
    """
    with _agreed(None if partial else comm):
        sums = _mlp(x, pack_weights(gate), pack_weights(up), pack_weights(down), pool or shared_pool(1))
    return _joined(sums, None, comm, partial, others)


def _mlp(x: np.ndarray, gate: Weights, up: Weights, down: Weights, pool: Pool) -> np.ndarray:
    if gate.layout != up.layout or not gate.rows == up.rows == down.blocks.size or x.shape[1:] != (gate.blocks.size,):
        raise ValueError(f"gate [{gate.rows}, {gate.blocks.size}], up [{up.rows}, {up.blocks.size}] and down [{down.rows}, "
                         f"{down.blocks.size}] do not fit each other and x of shape {x.shape}")
    x, sums, tokens = np.ascontiguousarray(x, np.float32), np.zeros((len(x), down.rows), np.int64), np.array([len(x)])
    if not len(x) or not gate.rows:
        return sums
    own = Activation(*x.shape, gate.blocks.block, gate.quantized)
    own.values[:] = x
    gated = Activation(len(x), gate.rows, down.blocks.block, down.quantized)
    program = Program(pool)
    if gate.quantized:
        add_quantize(program, "x", own, tokens)
    add_product(program, "gate, up", own, [gate.part(), up.part()], gate.layout, tokens, products.GATED, gated=gated)
    add_product(program, "down", gated, [down.part(sums)], down.layout, tokens, products.SUMS)
    found = program.run()
    if found >= 0:
        raise NumericsError(f"{program.names[found]}: a value is not finite, or beyond the range of exact sums")
    return sums


def _product(x: np.ndarray, weights: Weights, mode: int, pool: Pool | None) -> np.ndarray:
    status, out = products_of(x, weights, pool=pool, mode=mode) if weights.rows and weights.blocks.size else (
        0, np.zeros((len(x), weights.rows), np.int64 if mode == products.SUMS else np.float32))
    if status:
        raise NumericsError(f"a product of {x.shape} activations is not finite, or beyond the range of exact sums")
    return out


def _joined(sums: np.ndarray, bias: np.ndarray | None, comm, partial: bool, others: np.ndarray | None) -> np.ndarray:
    """Sums of all ranks as float32 and a bias, or those of this rank as they are."""
    sums = sums if others is None else sums + others
    if partial:
        return sums
    y = (all_reduce_sum(sums, comm) * UNFIXED).astype(np.float32)
    # All ranks have the same sums, so all raise.
    if not (np.abs(y) < OUTPUT_LIMIT).all():
        raise NumericsError("an output is beyond the range of exact sums, 2**20")
    return y if bias is None else y + np.asarray(bias, np.float32)


@contextmanager
def _agreed(comm):
    """A block that fails on all ranks or on none; arguments that do not fit become a UsageError."""
    with nullcontext() if comm is None or comm.size == 1 else agreed(comm, "computing a product"):
        try:
            yield
        except ValueError as error:
            raise UsageError(str(error)) from error
