"""``llama-hpc bench``: how fast this machine computes, against its own limits measured beside it."""

import argparse

from llama_hpc.cli.options import whole

SHAPES = ("4096x4096", "4096x11008", "8192x28672")


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser("bench", help="measure the kernels on this machine",
                                   description="Measure how fast this machine computes, against its own limits.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    kernels = kinds.add_parser(
        "kernels", help="products, against memory bandwidth and register-only arithmetic",
        description="Time products of random weights; bandwidth and peak are measured in alternation on the same threads. "
                    "Shares are medians over rounds.")
    kernels.add_argument("--weights", nargs="+", choices=("q3_5", "q8", "f32"), default=["q3_5"], help="formats (default: q3_5)")
    kernels.add_argument("--shapes", nargs="+", type=_shape, default=[_shape(text) for text in SHAPES], metavar="KxN",
                         help=f"inputs x outputs (default: {' '.join(SHAPES)})")
    kernels.add_argument("--tokens", nargs="+", type=whole(1, 65536), default=[1, 8, 256], metavar="M", help="default: 1 8 256")
    kernels.add_argument("--threads", nargs="+", type=whole(1, 4096), default=None, metavar="T", help="default: 1 and all cores")
    kernels.add_argument("--rounds", type=whole(1, 1000), default=7, metavar="R", help="default: 7")
    kernels.add_argument("--output", metavar="FILE", default="benchmark_parallel_results.json",
                         help="JSON file (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Runs in this process alone, without MPI."""
    import json
    from pathlib import Path

    from llama_hpc.errors import UsageError
    from llama_hpc.runtime import numba_setup
    from llama_hpc.runtime.launch import expected_tasks
    from llama_hpc.runtime.provenance import collect
    from llama_hpc.runtime.topology import available_cores
    if (expected_tasks() or 1) > 1:
        raise UsageError(f"bench kernels measures one process, but {expected_tasks()} were started; run it without mpirun")
    Path(args.output).write_text("", encoding="utf-8")
    threads = args.threads or sorted({1, available_cores()})
    numba_setup.configure(max(threads))
    numba_setup.check_kernels()
    from llama_hpc.bench.products import TITLES, as_json, measure
    from llama_hpc.kernels.cpu.target import kernels
    print(f"{kernels()} kernels, medians of {args.rounds} rounds")
    print("".join(title.rjust(14) for title in TITLES))
    found = []
    for weights in args.weights:
        for columns, rows in args.shapes:
            for tokens in args.tokens:
                for count in threads:
                    found.append(measure(weights, columns, rows, tokens, count, args.rounds))
                    print("".join(cell.rjust(14) for cell in found[-1].as_row()), flush=True)
    report = {**collect(), "kernels": kernels(), "results": as_json(found)}
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}")
    return 0


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) <= 1 << 20 for part in parts):
        raise argparse.ArgumentTypeError(f"must be KxN, such as 4096x11008, got {text!r}")
    return int(parts[0]), int(parts[1])
