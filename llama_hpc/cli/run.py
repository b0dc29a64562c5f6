"""``llama-hpc run``: answer a file of prompts on a grid of MPI ranks, into one HDF5 file."""

import argparse

from llama_hpc.cli.options import (
    add_context,
    add_device,
    add_durability,
    add_kv_cache,
    add_layout,
    add_log,
    add_output,
    add_reduce,
    add_sizes,
    add_threads,
    add_watch,
    memory_size,
    whole,
)
from llama_hpc.cli.start import checked_world, start
from llama_hpc.runtime.launch import fault_tolerant


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser("run", help="answer a file of prompts",
                                   description="Answer a file of prompts on a grid of MPI ranks, into one HDF5 file.")
    layout = add_layout(parser)
    add_sizes(layout)
    add_kv_cache(layout)
    add_reduce(layout)
    add_context(layout)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL, text (one prompt a line) or HDF5")
    add_output(parser)
    add_durability(parser)
    parser.add_argument("--trace", metavar="FILE", help="write a timeline for chrome://tracing or ui.perfetto.dev (JSON)")
    add_device(parser)
    add_threads(parser)
    add_watch(parser)
    add_log(parser)
    parser.add_argument("--hash-weights", action="store_true", help="also store a SHA-256 of the packed bytes of every tensor")
    sampling = parser.add_argument_group("sampling, unless a prompt says otherwise")
    sampling.add_argument("--max-tokens", default=128, metavar="N", help="tokens of an answer at most (default: 128)")
    sampling.add_argument("--temperature", default=0.0, metavar="T", help="0: greedy (default)")
    sampling.add_argument("--top-k", default=0, metavar="K", help="0: off (default)")
    sampling.add_argument("--top-p", default=1.0, metavar="P", help="1: off (default)")
    sampling.add_argument("--min-p", default=0.0, metavar="P", help="share of the likeliest token's weight; 0: off (default)")
    sampling.add_argument("--repetition-penalty", default=1.0, metavar="R",
                          help="for tokens of prompt and answer; 1: off (default)")
    sampling.add_argument("--presence-penalty", default=0.0, metavar="A", help="for tokens of the answer; 0: off (default)")
    sampling.add_argument("--frequency-penalty", default=0.0, metavar="A",
                          help="for each time that the answer has the token; 0: off (default)")
    sampling.add_argument("--logit-bias", action="append", default=[], metavar="ID=BIAS",
                          help="added to the logit of a token; may be repeated")
    sampling.add_argument("--n", default=1, metavar="N", help="answers to each prompt (default: 1)")
    sampling.add_argument("--seed", default=0, metavar="S", help="of all draws (default: 0)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    sampling.add_argument("--min-tokens", default=0, metavar="N", help="tokens before an answer may stop (default: 0)")
    sampling.add_argument("--logprobs", default=0, metavar="N",
                          help="also store the N likeliest tokens at each token, up to 20 (default: 0)")
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
    batching.add_argument("--adapt", action="store_true",
                          help="let token budget and prefill micro-batch follow the waiting of stages and the targets of --slo")
    dry = parser.add_argument_group("dry run, without reading weights; also on a login node")
    dry.add_argument("--dry-run", action="store_true",
                     help="check prompts, output and grid, print what each rank would hold and how it would batch, and stop")
    dry.add_argument("--ranks", type=whole(1), metavar="N",
                     help="as if N ranks were started (default: those that are, or as many as --grid needs)")
    dry.add_argument("--memory", type=memory_size, metavar="SIZE",
                     help="what each rank may use, on a GPU of that (default: its share of this node's)")
    parser.add_argument("--slo", metavar="TARGETS",
                        help="targets for prompts with arrival_s, such as ttft.p99=1.5,tpot.p50=0.05,rps=8; metrics are queue, "
                             "prefill, ttft, tpot, e2e")
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world, one call a rank. Returns 0; errors are exceptions."""
    from llama_hpc.runtime.stopping import Stop
    # From here on, as a job may be preempted while MPI starts.
    with Stop(args.time_limit) as stop:
        if fault_tolerant() and not args.dry_run:
            return _outliving(args, stop)
        settings, comm, node, (params, targets) = start(args, _read)
        if args.dry_run:
            from llama_hpc.cli.dry_run import DryRun as Job
        else:
            from llama_hpc.engine.job import Job
        return Job(args, settings, comm, node, params, targets, stop).run()


def _outliving(args: argparse.Namespace, stop) -> int:
    """A job that outlives ranks, from its start on."""
    comm = checked_world()
    from llama_hpc.comm.survivors import Survivors
    survivors = Survivors(comm)
    def job():
        settings, comm, node, (params, targets) = start(args, _read, survivors.comm)
        from llama_hpc.engine.survival import SurvivingJob
        return SurvivingJob(args, settings, comm, node, params, targets, stop, survivors)
    return survivors.persist(job).run()


def _read(args: argparse.Namespace) -> tuple:
    """(sampling settings of all prompts, targets for latencies)."""
    from llama_hpc.engine.latency import parse_targets
    from llama_hpc.errors import UsageError
    if not args.dry_run and (args.ranks or args.memory):
        raise UsageError("--ranks and --memory say what a --dry-run is about; a job has the ranks that mpirun or srun starts")
    if args.spares and not fault_tolerant():
        raise UsageError("--spares keeps ranks for those that are lost, which needs a job that may lose some: start it with "
                         "mpirun --with-ft ulfm (Open MPI 5)")
    return sampling_params(args), parse_targets(args.slo) if args.slo is not None else []


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
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    integers = ("top_k", "seed", "max_tokens", "n", "min_tokens", "logprobs")
    numbers = {name: number(name, float) for name in floats} | {name: number(name, int) for name in integers}
    return SamplingParams(**numbers, stop=tuple(args.stop), ignore_eos=args.ignore_eos, logit_bias=_biases(args.logit_bias))


def _biases(texts: list[str]) -> dict[str, float]:
    from llama_hpc.errors import UsageError
    biases = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            value = float(bias)
        except ValueError:
            raise UsageError(f"--logit-bias must be ID=BIAS, such as 42=-1.5, got {text!r}") from None
        if token in biases:
            raise UsageError(f"--logit-bias has token id {token} twice: keep one")
        biases[token] = value
    return biases
