"""Joins over a tensor group of GPUs: where the arrays of a step go, and what brings them there.

Three ways, all of integers and so with the same bits: through pinned memory of the host (``staged``), by an MPI library that
takes device pointers (``cuda-aware``: the library is asked), or by NCCL. ``choose_exchange`` takes the fastest.
"""

import ctypes
import logging
import time
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer

_LOG = logging.getLogger(__name__)
_ROUNDS = 5


class StagedExchange:
    """Through the host: ``reducer`` joins there. Methods join a device array in place; ``host`` is pinned memory of its shape,
    free to be written to.

    Collective over the communicator of ``reducer``, which counts. ``on_stream``: whether the host goes on while it is done.
    """

    name, on_stream = "staged", False

    def __init__(self, device, reducer: TensorReducer):
        self.device, self.reducer, self.comm = device, reducer, reducer.comm

    def sum_fixed(self, values, host: np.ndarray) -> None:
        """int64 sums."""
        self._timed(self._sum, values, host)

    def sum_disjoint(self, values, host: np.ndarray) -> None:
        """float32 values of which at most one rank holds a nonzero one: sums of their bits."""
        self._timed(self._sum, values.view(np.int32), host.view(np.int32))

    def maximum(self, values, host: np.ndarray) -> None:
        """int64 maxima."""
        self._timed(self._maximum, values, host)

    def _timed(self, join, values, host: np.ndarray) -> None:
        if not host.size:
            return
        reducer = self.reducer
        if self.on_stream:
            join(values, host)
        else:
            # What was launched before is no part of the join.
            self.device.synchronize()
            start = time.monotonic_ns()
            join(values, host)
            reducer.nanoseconds[0] += time.monotonic_ns() - start
        reducer.calls += 1
        reducer.numbers += host.size
        reducer.bytes += host.nbytes

    def _sum(self, values, host: np.ndarray) -> None:
        self._by_host(values, host, MPI.SUM)

    def _maximum(self, values, host: np.ndarray) -> None:
        self._by_host(values, host, MPI.MAX)

    def _by_host(self, values, host: np.ndarray, op: MPI.Op) -> None:
        self.device.download(values, host)
        self.comm.Allreduce(MPI.IN_PLACE, host, op=op)
        self.device.upload(host, values)


class DirectExchange(StagedExchange):
    """By an MPI library that takes device pointers."""

    name = "cuda-aware"

    def _sum(self, values, host: np.ndarray) -> None:
        self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.SUM)

    def _maximum(self, values, host: np.ndarray) -> None:
        self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.MAX)


class NCCLExchange(StagedExchange):
    """By NCCL, on the device's stream: what joins take is part of what kernels take. Making one is collective."""

    name, on_stream = "nccl", True

    def __init__(self, device, reducer: TensorReducer):
        super().__init__(device, reducer)
        from cupy.cuda import nccl
        self._nccl = nccl
        number = self.comm.bcast(nccl.get_unique_id() if self.comm.rank == 0 else None)
        self._group = nccl.NcclCommunicator(self.comm.size, number, self.comm.rank)

    def _all_reduce(self, values, op: int) -> None:
        kind = {"int64": self._nccl.NCCL_INT64, "int32": self._nccl.NCCL_INT32}[values.dtype.name]
        self._group.allReduce(values.data.ptr, values.data.ptr, values.size, kind, op, self.device.stream.ptr)

    def _sum(self, values, host: np.ndarray) -> None:
        self._all_reduce(values, self._nccl.NCCL_SUM)

    def _maximum(self, values, host: np.ndarray) -> None:
        self._all_reduce(values, self._nccl.NCCL_MAX)


def cuda_aware() -> bool:
    """Whether the MPI library says that it takes device pointers (MPIX_Query_cuda_support; MPICH: MPIX_GPU_query_support)."""
    library = ctypes.CDLL(None)
    with suppress(AttributeError):
        return bool(library.MPIX_Query_cuda_support())
    with suppress(AttributeError):
        found = ctypes.c_int(0)
        return library.MPIX_GPU_query_support(0, ctypes.byref(found)) == 0 and bool(found.value)
    return False


def has_nccl() -> bool:
    """Whether CuPy was built with NCCL, and finds it."""
    with suppress(Exception):
        from cupy.cuda import nccl
        return bool(getattr(nccl, "available", False))
    return False


def choose_exchange(device, reducer: TensorReducer, rows: int, columns: int) -> StagedExchange | None:
    """The fastest way to sum int64 [rows, columns] over the tensor group, measured; None where that is one rank. Collective over
    it; the first rank logs what each way takes."""
    comm = reducer.comm
    if comm.size == 1:
        return None
    kinds = [StagedExchange]
    # One device for two ranks is nothing for NCCL, nor what only some of them have for anybody.
    if comm.allreduce(cuda_aware(), MPI.LAND):
        kinds.append(DirectExchange)
    if comm.allreduce(has_nccl(), MPI.LAND) and _distinct(comm, device):
        kinds.append(NCCLExchange)
    made = [kind(device, reducer) for kind in kinds]
    if len(made) == 1:
        return made[0]
    values, host = device.zeros((rows, columns), np.int64), device.pinned((rows, columns), np.int64)
    seconds = [_seconds(each, values, host) for each in made]
    if comm.rank == 0:
        _LOG.info("reductions between GPUs: %s for %d x %d sums", ", ".join(
            f"{each.name} {1e6 * time:.0f} us" for each, time in zip(made, seconds, strict=True)), rows, columns)
    reducer.reset()
    return made[int(np.argmin(seconds))]


def _seconds(exchange: StagedExchange, values, host: np.ndarray) -> float:
    """Of the slowest rank, in the best round."""
    best = float("inf")
    for _ in range(_ROUNDS):
        exchange.comm.Barrier()
        start = time.perf_counter()
        exchange.sum_fixed(values, host)
        exchange.device.synchronize()
        best = min(best, exchange.comm.allreduce(time.perf_counter() - start, MPI.MAX))
    return best


def _distinct(comm: MPI.Comm, device) -> bool:
    """Whether each rank has a device of its own."""
    found = comm.allgather(device.identity)
    return len(set(found)) == comm.size
