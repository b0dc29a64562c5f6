"""``llama-hpc quantize``: quantise a model once, into one HDF5 file that runs load from at the speed of the disk."""

import argparse

from llama_hpc.cli.options import add_model, add_threads, add_weights


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser(
        "quantize", help="quantise a model once, into one file that runs load",
        description="Quantise a model once, into one HDF5 file with its configuration and tokenizer, which run and info take as "
                    "a MODEL. Ranks under mpirun or srun share the work; the file is the same, whatever their number.")
    add_model(parser)
    parser.add_argument("output", metavar="OUT.h5", help="HDF5 file to write")
    add_weights(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_threads(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world, one call a rank. Returns 0; errors are exceptions."""
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)
    from pathlib import Path

    from mpi4py import MPI

    from llama_hpc.runtime import log, numba_setup
    from llama_hpc.runtime.abort import agreed, on_first
    from llama_hpc.runtime.topology import default_threads
    logger = log.setup(comm.rank)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    with agreed(comm, "reading the command line"):
        threads = default_threads(node.size, args.threads)
    numba_setup.configure(threads)
    on_first(comm, _check_output, args)
    from llama_hpc.weights.checkpoint import open_checkpoint
    with agreed(comm, "opening the model"):
        checkpoint = open_checkpoint(args.model)
        weights = _format(checkpoint, args.weights)
    from llama_hpc.engine.warmup import once_per_node, warm_up_quantizing
    once_per_node(node, lambda: warm_up_quantizing(weights, threads))
    from llama_hpc.weights.store_writer import write_store
    written = write_store(checkpoint, weights, Path(args.output), comm, threads=threads, overwrite=args.overwrite)
    if comm.rank == 0:
        logger.info("%s: %s, %.1f MiB, %.2f bits a weight all in (layers %.2f), content SHA-256 %s", args.output, weights,
                    written.size / 2**20, written.bits, written.layer_bits, written.sha256)
    return 0


def _check_output(args: argparse.Namespace) -> None:
    from llama_hpc.results import check_output_path
    check_output_path(args.output, args.overwrite)


def _format(checkpoint, asked: str | None) -> str:
    from llama_hpc.errors import UsageError
    from llama_hpc.weights.checkpoint import weights_format
    from llama_hpc.weights.store import Store
    if isinstance(checkpoint, Store):
        raise UsageError(f"model {checkpoint.path} is quantised already, to {checkpoint.weights}: give the model that it was "
                         f"made from ({checkpoint.source})")
    return weights_format(checkpoint, asked)
