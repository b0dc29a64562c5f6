"""What every job under MPI does before it may use a kernel."""

import logging
from collections.abc import Callable
from typing import Any

from llama_hpc.runtime import devices, numba_setup
from llama_hpc.runtime.abort import agreed
from llama_hpc.runtime.devices import CPU, Choice
from llama_hpc.runtime.topology import default_threads, hostname

_LOG = logging.getLogger(__name__)


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


def take_devices(comm, node, option: str) -> list[Choice]:
    """What each rank of ``node``, those of ``comm`` on this node, computes on, by ``option``: auto, cpu or gpu.

    With auto, the first rank tells which ranks have no GPU. Collective over ``comm``; with gpu, all ranks raise the same error
    where one has none: UsageError for more ranks than GPUs, else DeviceUnavailable. What ranks outside of ``comm`` compute on is
    not known here: where they use GPUs too, CUDA_VISIBLE_DEVICES has to divide these.
    """
    if option == "cpu":
        return [CPU] * node.size
    with agreed(comm, "looking for GPUs"):
        sight = devices.look(option)
    choices = devices.choose(node.allgather(sight))
    own = choices[node.rank]
    with agreed(comm, "choosing the GPUs"):
        if option == "gpu" and own.kind == "cpu":
            raise devices.refusal(own)
    found = comm.gather((own, hostname()))
    if comm.rank == 0:
        line, surprising = devices.without_gpu(*zip(*found, strict=True))
        if line:
            _LOG.log(logging.WARNING if surprising else logging.DEBUG, "%s", line)
    return choices
