"""How the commands that run a model under MPI begin."""

import argparse


def checked_world():
    """The world, with all ranks that were started. Raises LaunchError."""
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)
    return comm


def start(args: argparse.Namespace, read=lambda args: None, comm=None) -> tuple:
    """(ModelSettings, communicator, communicator of its ranks on this node, ``read(args)``).

    ``read`` checks more of the command line. Collective over ``comm``, by default the world; raises UsageError on every rank
    alike.
    """
    world = checked_world()
    comm = comm or world
    from llama_hpc.cli.options import grid_shape
    from llama_hpc.runtime import log
    from llama_hpc.runtime.start import prepare
    log.setup(comm.rank)
    _watch(args, comm)
    ranks = world.size - getattr(args, "spares", 0)
    node, threads, (more, shape) = prepare(comm, args.threads, lambda: (read(args), grid_shape(args, ranks)))
    from llama_hpc.engine.model_job import ModelSettings
    settings = ModelSettings(args.model, args.weights, threads, shape, args.reduce, args.sequence_parallel, args.overlap,
                             args.kv_cache, context_parallel=args.context_parallel)
    return settings, comm, node, more


def _watch(args: argparse.Namespace, comm) -> None:
    """The watchdog of the command. Collective over ``comm``."""
    import os
    from pathlib import Path

    from llama_hpc.runtime import watchdog
    kept = hasattr(args, "resume")
    # Of a run, beside the answers that it keeps (see ``results.parts``).
    folder = Path(os.path.realpath(args.output) + (".progress" if kept else ".hang"))
    cure = "finished answers are kept, --resume goes on" if kept else "nothing is kept, begin again"
    watchdog.start(comm, args.hang_limit, folder, cure, alone=True)
