"""How the commands that run a model under MPI begin."""

import argparse


def start(args: argparse.Namespace, read=lambda args: None) -> tuple:
    """(world, communicator of this node's ranks, threads of a rank, grid shape or None for auto, ``read(args)``).

    ``read`` checks more of the command line. Collective over the world; raises UsageError on every rank alike.
    """
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)
    from mpi4py import MPI

    from llama_hpc.cli.options import grid_shape
    from llama_hpc.runtime import log, numba_setup
    from llama_hpc.runtime.abort import agreed
    from llama_hpc.runtime.topology import default_threads
    log.setup(comm.rank)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    with agreed(comm, "reading the command line"):
        more = read(args)
        shape = grid_shape(args, comm.size)
        threads = default_threads(node.size, args.threads)
    numba_setup.configure(threads)
    with agreed(comm, "choosing the kernels"):
        numba_setup.check_kernels()
    return comm, node, threads, shape, more
