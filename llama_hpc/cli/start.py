"""How the commands that run a model under MPI begin."""

import argparse
import logging
import os
from pathlib import Path

from llama_hpc.runtime.topology import hostname

_LOG = logging.getLogger(__name__)


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
    from llama_hpc.runtime.abort import agreed
    from llama_hpc.runtime.start import prepare
    with agreed(comm, "opening the logs"):
        log.setup(comm.rank, args.log_dir, args.log_json)
    _LOG.debug("llama-hpc %s: rank %d of %d on %s, process %d", args.command, comm.rank, comm.size, hostname(), os.getpid())
    _watch(args, comm)
    ranks = _ranks(args, world.size)
    node, threads, (more, shape) = prepare(comm, args.threads, lambda: (read(args), grid_shape(args, ranks)))
    from llama_hpc.engine.model_job import ModelSettings
    settings = ModelSettings(args.model, args.weights, threads, shape, args.reduce, args.sequence_parallel, args.overlap,
                             args.kv_cache, context_parallel=args.context_parallel, heartbeat=args.heartbeat,
                             device="cpu" if assumed(args, comm.size, shape) else args.device)
    return settings, comm, node, more


def assumed(args: argparse.Namespace, size: int, shape) -> bool:
    """Whether the command, started as ``size`` ranks, is a dry run about other ranks: then their GPUs cannot be looked for."""
    return getattr(args, "dry_run", False) and size == 1 and bool(args.ranks or args.memory or (shape and shape.size > 1))


def _watch(args: argparse.Namespace, comm) -> None:
    """The watchdog of the command. Collective over ``comm``."""
    from llama_hpc.runtime import watchdog
    kept = hasattr(args, "resume")
    # Of a run, beside the answers that it keeps (see ``results.parts``).
    folder = Path(os.path.realpath(args.output) + (".progress" if kept else ".hang"))
    cure = "finished answers are kept, --resume goes on" if kept else "nothing is kept, begin again"
    watchdog.start(comm, args.hang_limit, folder, cure, args.alone)


def _ranks(args: argparse.Namespace, size: int) -> int | None:
    """How many ranks a grid of a world of this size has; None: any, in a dry run alone. Raises UsageError."""
    if not getattr(args, "dry_run", False):
        return size - getattr(args, "spares", 0)
    if size > 1 and args.ranks not in (None, size):
        from llama_hpc.errors import UsageError
        raise UsageError(f"--ranks {args.ranks}: {size} ranks were started; leave it out, or start one process")
    return args.ranks if size == 1 else size - args.spares
