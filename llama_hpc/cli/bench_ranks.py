"""``llama-hpc bench comm`` and ``bench scaling``: what several ranks reach together, under mpirun or srun."""

import argparse

from llama_hpc.cli.options import FORMATS, add_report, add_threads, matrix_shape, memory_size, whole

KINDS = ("comm", "scaling")
OPERATIONS = ("allreduce", "allreduce-bits", "allgather", "alltoall", "pingpong", "both-ways", "window-copy", "window-sum")
SIZES = ("8", "64", "512", "4K", "32K", "256K", "1M", "4M")
STRATEGIES = ("data", "model", "tensor")
BATCHES = (1, 8, 32, 128)


def add_kinds(kinds) -> None:
    """Add both kinds to the parser of ``bench``."""
    comm = kinds.add_parser(
        "comm", help="exchanges between ranks, inside a node and between nodes, by message size",
        description="Time exchanges between ranks, under mpirun or srun: of all ranks on the first rank's node, then of one rank "
                    "on each node. Each is checked first. Sizes are those of a rank's whole buffer. MB/s are size / time; of the "
                    "bus times 2(n-1)/n for sums over n ranks, (n-1)/n for allgather and alltoall, 2 for both ways, as in "
                    "nccl-tests and the OSU benchmarks.")
    comm.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OP",
                      help=f"of {', '.join(OPERATIONS)} (default: all); allreduce adds int64, allreduce-bits joins float32; "
                           "pingpong (time of one way) and both-ways are between the first two ranks; window-copy and "
                           "window-sum go through memory that ranks of a node share, without MPI")
    comm.add_argument("--sizes", nargs="+", type=_message, default=[_message(size) for size in SIZES], metavar="BYTES",
                      help=f"such as 512 or 64K (default: {' '.join(SIZES)})")
    add_report(comm, 7)
    comm.set_defaults(bench=_comm, threads=1)
    scaling = kinds.add_parser(
        "scaling", help="one product on 1, 2, 4, … and all ranks, shared in three ways",
        description="Time a product of random weights on 1, 2, 4, … and all ranks of mpirun or srun, while the others sleep. "
                    "data: rows of the batch are dealt out; model: outputs, and gathered; tensor: inputs, and exact sums added. "
                    "All must give the bits of one rank. Communication includes waiting for other ranks.")
    scaling.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="S",
                         help=f"of {', '.join(STRATEGIES)} (default: all)")
    scaling.add_argument("--batches", nargs="+", type=whole(1, 65536), default=list(BATCHES), metavar="N",
                         help=f"rows (default: {' '.join(map(str, BATCHES))})")
    scaling.add_argument("--weak", action="store_true", help="batches are those of each rank (default: of all ranks together)")
    scaling.add_argument("--shape", type=matrix_shape, default=(4096, 4096), metavar="KxN",
                         help="inputs x outputs (default: 4096x4096)")
    scaling.add_argument("--weights", choices=FORMATS, default="q3_5", help="format (default: q3_5)")
    scaling.add_argument("--copies", type=whole(1, 1024), metavar="N",
                         help="matrices that are multiplied one after the other, as layers are; data takes memory for all of "
                              "them on every rank (default: as many as exceed the caches, at most 32)")
    add_threads(scaling)
    add_report(scaling, 5)
    scaling.set_defaults(bench=_scaling)


def main(args: argparse.Namespace) -> int:
    """Collective over the world, one call a rank. Returns 0; errors are exceptions."""
    from llama_hpc.runtime.launch import check_world, world
    comm = world()
    check_world(comm)
    from mpi4py import MPI

    from llama_hpc.errors import UsageError
    from llama_hpc.runtime import numba_setup
    from llama_hpc.runtime.abort import agreed
    from llama_hpc.runtime.topology import default_threads
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    with agreed(comm, "reading the command line"):
        if args.kind == "comm" and comm.size == 1:
            raise UsageError("bench comm measures between ranks, and there is one; start several, as in mpirun -n 2 "
                             "llama-hpc bench comm")
        args.threads = default_threads(node.size, args.threads)
    numba_setup.configure(args.threads)
    with agreed(comm, "choosing the kernels"):
        numba_setup.check_kernels()
    from llama_hpc.bench.ranks import count_nodes
    from llama_hpc.bench.report import Report
    report, nodes = None, count_nodes(comm)
    with agreed(comm, "opening the report"):
        if comm.rank == 0:
            report = Report(args.output)
            report.facts |= {"ranks": comm.size, "nodes": nodes, "threads": args.threads}
            print(f"{comm.size} rank{'s' * (comm.size > 1)} on {nodes} node{'s' * (nodes > 1)}, "
                  f"{report.facts['kernels']} kernels, medians of {args.rounds} rounds", flush=True)
    args.bench(args, report, comm, node)
    with agreed(comm, "writing the report"):
        if report:
            report.write()
    return 0


def _comm(args: argparse.Namespace, report, comm, node) -> None:
    from llama_hpc.bench import comm as bench
    from llama_hpc.engine.warmup import once_per_node
    once_per_node(node, bench.warm_up)
    bench.measure_exchanges(args, report, comm, node)


def _scaling(args: argparse.Namespace, report, comm, node) -> None:
    from llama_hpc.bench import scaling as bench
    from llama_hpc.engine.warmup import once_per_node
    from llama_hpc.kernels.cpu.workers import Pool
    from llama_hpc.runtime.abort import agreed
    from llama_hpc.runtime.topology import thread_places
    with agreed(comm, "starting the threads"):
        pool, places = Pool(args.threads), thread_places(args.threads)
        pool.bind(places)
    once_per_node(node, lambda: bench.warm_up(args.weights, pool))
    bench.measure_scaling(args, report, comm, pool)


def _message(text: str) -> int:
    size = memory_size(text)
    if size % 8 or not 8 <= size <= 1 << 30:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8 bytes from 8 to 1G, got {text!r}")
    return size
