"""The reducer that suits a tensor group: by where its ranks are, or as asked."""

import os

from mpi4py import MPI

from llama_hpc.comm.one_sided import OneSidedReducer
from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.comm.shared import SHARED_FOLDER, CombinedReducer, SharedReducer
from llama_hpc.errors import UsageError
from llama_hpc.kernels.cpu.waiting import Alarm


def tensor_reducer(comm: MPI.Comm, mode: str, crowded: bool, window_bytes: int = 0, alarm: Alarm | None = None) -> TensorReducer:
    """The reducer of a tensor group. Collective over ``comm``.

    ``mode`` auto: shared memory inside of a node, MPI between nodes, both where several ranks are on each of several nodes. Else
    mpi, shared or one-sided. ``crowded``: more threads than cores. ``window_bytes``: what each rank will put into shared windows;
    where there is no room for it, auto means MPI. ``alarm`` ends waits for ranks that are gone. Raises UsageError where ranks are
    on different nodes that are to share memory.
    """
    if comm.size == 1 or mode == "mpi":
        return TensorReducer(comm)
    if mode == "one-sided":
        return OneSidedReducer(comm, alarm)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    smallest, largest = comm.allreduce(node.size, MPI.MIN), comm.allreduce(node.size, MPI.MAX)
    if mode == "shared" and smallest < comm.size:
        raise UsageError(f"--reduce shared needs all {comm.size} ranks of a tensor group on one node, but one has {smallest} of "
                         "them: use --reduce auto, or fewer tensor ranks")
    room = comm.allreduce(mode == "shared" or _room() > 2 * window_bytes * node.size, MPI.LAND)
    if room and largest > 1 and smallest < comm.size:
        return CombinedReducer(comm, node, crowded, alarm)
    node.Free()
    return SharedReducer(comm, crowded, alarm) if room and largest > 1 else TensorReducer(comm)


def _room() -> int:
    """Bytes that shared windows may still take on this node."""
    if not os.path.isdir(SHARED_FOLDER):
        return 0
    status = os.statvfs(SHARED_FOLDER)
    return status.f_bavail * status.f_frsize
