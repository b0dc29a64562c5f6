"""How the commands that run a model under MPI begin."""

import argparse


def start(args: argparse.Namespace, read=lambda args: None) -> tuple:
    """(ModelSettings, world, communicator of this node's ranks, ``read(args)``).

    ``read`` checks more of the command line. Collective over the world; raises UsageError on every rank alike.
    """
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)

    from llama_hpc.cli.options import grid_shape
    from llama_hpc.runtime import log
    from llama_hpc.runtime.start import prepare
    log.setup(comm.rank)
    node, threads, (more, shape) = prepare(comm, args.threads, lambda: (read(args), grid_shape(args, comm.size)))
    from llama_hpc.engine.model_job import ModelSettings
    settings = ModelSettings(args.model, args.weights, threads, shape, args.reduce, args.sequence_parallel, args.overlap,
                             args.kv_cache, context_parallel=args.context_parallel)
    return settings, comm, node, more
