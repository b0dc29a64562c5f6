"""What every job under MPI does before it may use a kernel."""

from collections.abc import Callable
from typing import Any

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.abort import agreed
from llama_hpc.runtime.topology import default_threads


def prepare(comm, threads: int | None, read: Callable[[], Any]) -> tuple:
    """(communicator of the ranks of ``comm`` on this node, threads of a rank, ``read()``).

    ``threads``: see ``default_threads``; ``read`` checks settings. Collective over ``comm``; all ranks raise the same UsageError.
    """
    from mpi4py import MPI
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    with agreed(comm, "reading the settings"):
        found = read()
        threads = default_threads(node.size, threads)
    numba_setup.configure(threads)
    with agreed(comm, "choosing the kernels"):
        numba_setup.check_kernels()
    return node, threads, found
