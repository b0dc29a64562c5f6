"""``llama-hpc run``: answer a file of prompts on a grid of MPI ranks, into one HDF5 file."""

import argparse

from llama_hpc.cli.options import add_layout, add_output, add_sizes, add_threads, memory_size, whole
from llama_hpc.cli.start import start


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser("run", help="answer a file of prompts",
                                   description="Answer a file of prompts on a grid of MPI ranks, into one HDF5 file.")
    add_sizes(add_layout(parser))
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL, text (one prompt a line) or HDF5")
    add_output(parser)
    add_threads(parser)
    parser.add_argument("--hash-weights", action="store_true", help="also store a SHA-256 of the packed bytes of every tensor")
    sampling = parser.add_argument_group("sampling, unless a prompt says otherwise")
    sampling.add_argument("--max-tokens", default=128, metavar="N", help="tokens of an answer at most (default: 128)")
    sampling.add_argument("--temperature", default=0.0, metavar="T", help="0: greedy (default)")
    sampling.add_argument("--top-k", default=0, metavar="K", help="0: off (default)")
    sampling.add_argument("--top-p", default=1.0, metavar="P", help="1: off (default)")
    sampling.add_argument("--seed", default=0, metavar="S", help="of all draws (default: 0)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    batching = parser.add_argument_group("batching (changes speed and memory, never the answers)")
    batching.add_argument("--token-budget", type=whole(1), default=8192, metavar="N",
                          help="tokens of a step at most, of prompts and answers together (default: %(default)s)")
    batching.add_argument("--micro-batches", type=whole(1), metavar="N",
                          help="steps under way at once on the pipeline (default: by the number of stages)")
    batching.add_argument("--prefill-micro-batch", type=whole(1), metavar="N",
                          help="prompt tokens of a step at most (default: the token budget; on a pipeline less)")
    batching.add_argument("--decode-micro-batch", type=whole(1), metavar="N",
                          help="decoding sequences of a step at most (default: an equal share of those that run)")
    batching.add_argument("--kv-memory", type=memory_size, metavar="SIZE",
                          help="memory of each rank's KV cache, such as 4G (default: 85 %% of what it may use, less weights)")
    batching.add_argument("--no-prefix-sharing", dest="prefix_sharing", action="store_false",
                          help="compute equal beginnings of prompts for each prompt anew")
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world, one call a rank. Returns 0; errors are exceptions."""
    comm, node, threads, shape, params = start(args, sampling_params)
    from llama_hpc.engine.job import Job
    return Job(args, comm, node, threads, shape, params).run()


def sampling_params(args: argparse.Namespace):
    """The defaults of all requests; raises UsageError that names the option."""
    from llama_hpc.engine.sampling_params import SamplingParams
    from llama_hpc.errors import UsageError
    def number(name: str, kind):
        text = getattr(args, name)
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {text!r}") from None
    return SamplingParams(temperature=number("temperature", float), top_k=number("top_k", int), top_p=number("top_p", float),
                          seed=number("seed", int), max_tokens=number("max_tokens", int), stop=tuple(args.stop),
                          ignore_eos=args.ignore_eos)
