"""``llama-hpc bench``: how fast this machine computes, against its own limits measured beside it, and against llama.cpp."""

import argparse

from llama_hpc.bench.shapes import SHAPES
from llama_hpc.cli import bench_ranks
from llama_hpc.cli.options import FORMATS, add_kv_cache, add_report, matrix_shape, whole

SCHEDULES = ("static", "dynamic", "guided", "nested", "tiled", "steal")
CASES = ("decode", "prefill", "batch")
# Those of Llama-2-7B and Llama-3-70B; on a GPU of Llama-3-8B and -70B.
PRODUCTS = {"cpu": ("4096x4096", "11008x4096", "8192x28672"),
            "gpu": ("4096x4096", "4096x14336", "14336x4096", "8192x8192", "8192x28672", "28672x8192")}
TOKENS = {"cpu": (1, 8, 256), "gpu": (1, 16, 64, 256, 1024)}
BATCH = {"cpu": 32, "gpu": 64}
PEER_FORMATS = ("Q4_0", "Q4_0-pure", "Q3_K_S", "IQ3_S")


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser(
        "bench", help="measure kernels and models on this machine",
        description="Measure how fast this machine computes, against its own limits measured in alternation on the same threads. "
                    "Figures are medians over rounds.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_kernels(kinds)
    _add_model(kinds)
    bench_ranks.add_kinds(kinds)
    return parser


def _add_kernels(kinds) -> None:
    kernels = kinds.add_parser(
        "kernels", help="products, against memory bandwidth and register-only arithmetic",
        description="Time products of random weights. All schedules and thread counts must give the same bits.")
    kernels.add_argument("--weights", nargs="+", choices=FORMATS, default=["q3_5"], help="formats (default: q3_5)")
    kernels.add_argument("--shapes", nargs="+", type=matrix_shape, metavar="KxN",
                         help=f"inputs x outputs (default: {_defaults(PRODUCTS)})")
    kernels.add_argument("--tokens", nargs="+", type=whole(1, 65536), metavar="M", help=f"default: {_defaults(TOKENS)}")
    kernels.add_argument("--schedules", nargs="+", choices=SCHEDULES,
                         help="how threads share a product (default: steal)")
    kernels.add_argument("--compare", action="store_true",
                         help="instead, compare scalar code, the kernels on one thread, and every schedule on the most threads")
    _add_device(kernels, "products against a copy of its memory and cuBLAS, and attention")
    _add_common(kernels, 7)
    kernels.set_defaults(bench=_kernels)


def _add_model(kinds) -> None:
    model = kinds.add_parser(
        "model", help="a whole model: one sequence, a prompt, a batch; and llama.cpp beside it",
        description="Time a model, or random weights of its shape: decode of one sequence, prefill of a prompt, decode of a "
                    "batch of sequences.")
    model.add_argument("model", metavar="MODEL", nargs="?", help="as for run; or give --shape")
    model.add_argument("--shape", choices=SHAPES, metavar="NAME", help=f"random weights in the shape of {', '.join(SHAPES)}")
    model.add_argument("--layers", type=whole(1), metavar="N", help="of --shape, its first N layers only")
    model.add_argument("--weights", nargs="+", choices=FORMATS, help="formats (default: q3_5, or that of a quantised model)")
    add_kv_cache(model)
    model.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to time (default: all)")
    model.add_argument("--tokens", type=whole(1, 65536), default=64, metavar="N", help="of decode (default: 64)")
    model.add_argument("--prompt", type=whole(1, 65536), default=512, metavar="N", help="tokens of prefill (default: 512)")
    model.add_argument("--batch", type=whole(1, 4096), metavar="N",
                       help=f"sequences of a batch, which grow from 16 to 48 tokens (default: {_defaults(BATCH)})")
    _add_device(model, "random weights in a --shape, against what a copy of its memory allows")
    peer = model.add_argument_group("comparison with llama.cpp, run in alternation with the same threads")
    peer.add_argument("--peer", metavar="DIR", help="build folder of llama.cpp; needs --shape or a GGUF file")
    peer.add_argument("--peer-formats", nargs="+", default=list(PEER_FORMATS), metavar="F",
                      help=f"of llama-quantize, with -pure for --pure (default: {' '.join(PEER_FORMATS)})")
    peer.add_argument("--peer-models", metavar="DIR", help="keep its models in this folder (default: they are deleted)")
    _add_common(model, 5)
    model.set_defaults(bench=_model)


def _add_device(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help=f"cpu (the default), or the first GPU: {what}")


def _defaults(values: dict) -> str:
    """What ``--device`` makes of an option that is left out."""
    cpu, gpu = (" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values.values())
    return f"{cpu}; on a GPU {gpu}"


def _fill(args: argparse.Namespace) -> None:
    """Options that were left out. Raises UsageError for those that a GPU does not have."""
    from llama_hpc.errors import UsageError
    for name, values in (("tokens", TOKENS), ("shapes", PRODUCTS), ("batch", BATCH)):
        if getattr(args, name, "") is None:
            value = values[args.device]
            setattr(args, name, list(map(matrix_shape, value)) if name == "shapes" else value)
    for name in ("threads", "schedules", "compare", "peer"):
        if args.device == "gpu" and getattr(args, name, None):
            raise UsageError(f"--{name} is for --device cpu")
    if args.kind == "kernels":
        args.schedules = args.schedules or ["steal"]


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--threads", nargs="+", type=whole(1, 4096), metavar="T", help="default: 1 and all cores")
    add_report(parser, rounds)


def main(args: argparse.Namespace) -> int:
    """``comm`` and ``scaling`` are collective over the world, the others for one process. Returns 0; errors are exceptions."""
    if args.kind in bench_ranks.KINDS:
        return bench_ranks.main(args)
    import os

    from llama_hpc.errors import UsageError
    from llama_hpc.runtime import numba_setup
    from llama_hpc.runtime.launch import expected_tasks
    from llama_hpc.runtime.topology import available_cores
    if (expected_tasks() or 1) > 1:
        raise UsageError(f"bench {args.kind} measures one process, but {expected_tasks()} were started; run it without "
                         "mpirun")
    _fill(args)
    # What this process sets for its own threads is not for llama.cpp.
    args.environment = dict(os.environ)
    args.threads = args.threads or sorted({1, available_cores()})
    numba_setup.configure(max(args.threads))
    numba_setup.check_kernels()
    from llama_hpc.bench.report import Report
    report = Report(args.output)
    print(f"{'CUDA' if args.device == 'gpu' else report.facts['kernels']} kernels, medians of {args.rounds} rounds", flush=True)
    args.bench(args, report)
    report.write()
    return 0


def _kernels(args: argparse.Namespace, report) -> None:
    if args.device == "gpu":
        from llama_hpc.bench.device_commands import measure_kernels
        measure_kernels(args, report)
        return
    from llama_hpc.bench.commands import compare_schedules, measure_products
    (compare_schedules if args.compare else measure_products)(args, report)


def _model(args: argparse.Namespace, report) -> None:
    if args.device == "gpu":
        from llama_hpc.bench.device_commands import measure_models
    else:
        from llama_hpc.bench.commands import measure_models
    measure_models(args, report)
