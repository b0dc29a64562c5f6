"""``llama-hpc score``: log-likelihood of every token of texts, and their perplexity, on a grid of MPI ranks."""

import argparse

from llama_hpc.cli.options import (
    add_context,
    add_device,
    add_kv_cache,
    add_layout,
    add_log,
    add_output,
    add_reduce,
    add_rescue,
    add_threads,
    add_watch,
    whole,
)
from llama_hpc.cli.start import start


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser(
        "score", help="log-likelihood and perplexity of texts",
        description="Log-likelihood of every token of texts and their perplexity, each and all together, on a grid of MPI ranks, "
                    "into one HDF5 file. A window of tokens slides over each text; each window scores what the ones before it "
                    "have not. The first token of a text has no likelihood.")
    layout = add_layout(parser)
    add_kv_cache(layout)
    add_reduce(layout)
    add_context(layout)
    parser.add_argument("--texts", required=True, metavar="FILE",
                        help="JSONL (objects with text or token_ids, and perhaps id), text (one document) or HDF5")
    add_output(parser)
    add_rescue(parser, "where the scores go when the output's file system fails")
    add_device(parser)
    add_threads(parser)
    add_watch(parser)
    add_log(parser)
    parser.add_argument("--window", type=whole(2), metavar="N",
                        help="tokens of a window (default: the model's context, at most 2048)")
    parser.add_argument("--stride", type=whole(1), metavar="N",
                        help="tokens from the start of a window to that of the next one (default: half a window)")
    parser.add_argument("--token-budget", type=whole(1), default=512, metavar="N",
                        help="tokens of a step at most (default: %(default)s); changes speed and memory, never the scores")
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world, one call a rank. Returns 0; errors are exceptions."""
    settings, comm, node, _ = start(args)
    from llama_hpc.engine.score_job import ScoreJob
    return ScoreJob(args, settings, comm, node).run()
