"""``llama-hpc info``: a model's shapes, and what every rank of a grid would hold."""

import argparse


def add_parser(subparsers) -> argparse.ArgumentParser:
    p = subparsers.add_parser("info", help="info", description=__doc__)
    from llama_hpc.cli.options import add_layout
    add_layout(p)
    return p
def main(args): return 0
