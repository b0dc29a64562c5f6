"""``llama-hpc warmup``: compile the kernels ahead of a job, into the cache of this node."""

import argparse
import os

from llama_hpc.cli.options import FORMATS, KV_CACHES, whole


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser(
        "warmup", help="compile the kernels ahead of a job",
        description="Compile the kernels ahead of a job, into the cache of this node; under mpirun or srun, of each node.")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=FORMATS, help="weight formats (default: all)")
    parser.add_argument("--kv-cache", nargs="+", choices=KV_CACHES, default=KV_CACHES,
                        help="formats of the KV cache (default: all)")
    parser.add_argument("--threads", type=whole(1, 4096), metavar="N", help="threads of a rank (default: one, and several)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world; the first rank reports. Returns 0; errors are exceptions."""
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)
    from mpi4py import MPI

    from llama_hpc.runtime import log, numba_setup
    from llama_hpc.runtime.abort import agreed
    logger = log.setup(comm.rank)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    threads = (args.threads,) if args.threads else (1, 2)
    numba_setup.configure(max(threads))
    with agreed(comm, "choosing the kernels"):
        numba_setup.check_kernels()
    report = ""
    with agreed(comm, "compiling the kernels"):
        if node.rank == 0:
            report = _compile(args.weights, args.kv_cache, threads)
    for line in filter(None, comm.gather(report) or ()):
        logger.info("%s", line)
    return 0


def _compile(formats, kv_caches, threads: tuple[int, ...]) -> str:
    """Compiles for each weight format, format of the KV cache and number of threads; returns what was done, and where."""
    import time
    from pathlib import Path

    from mpi4py import MPI

    from llama_hpc.engine.warmup import warm_up, warm_up_quantizing
    from llama_hpc.kernels.cpu.operation import compiled
    from llama_hpc.kernels.cpu.target import kernels
    from llama_hpc.kernels.cpu.workers import Pool
    from llama_hpc.model.kv_cache import cache_format
    from llama_hpc.runtime.topology import hostname
    start = time.monotonic()
    for count in threads:
        pool = Pool(count)
        for weights_format in formats:
            for kv_cache in sorted({cache_format(asked, weights_format) for asked in kv_caches}):
                warm_up(weights_format, pool, MPI.COMM_SELF, kv_cache, context=True)
            warm_up_quantizing(weights_format, count)
        pool.close()
    folder = os.environ.get("NUMBA_CACHE_DIR", "")
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) if folder else 0
    place = f"{folder} holds {size / 2**20:.1f} MiB" if folder else "Numba's own cache has them"
    return f"{hostname()}: {compiled()} functions compiled ({kernels()} kernels) in {time.monotonic() - start:.1f} s; {place}"
