"""The frame of the command line: ``llama-hpc COMMAND …``. Every command is a module of this package.

A command module offers ``add_parser(subparsers)`` and ``main(args)`` and is cheap to import: MPI, NumPy and the rest
are imported inside its functions.
"""

import argparse
import gc
import importlib
from typing import NoReturn

import llama_hpc
from llama_hpc.runtime.abort import end_process, guarded
from llama_hpc.runtime.activity import doing
from llama_hpc.runtime.launch import is_first, let_first_speak

COMMANDS = ("run", "score", "quantize", "info", "show", "bench", "warmup")


class Parser(argparse.ArgumentParser):
    """Speaks on the first rank only, and says what is wrong with a command line in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        """Print the line and exit with code 2."""
        self.exit(2, f"llama-hpc: error: {message} (see `{self.prog} --help`)\n")

    def exit(self, status: int = 0, message: str | None = None) -> None:
        """Exit, on an error not before the first rank has printed it."""
        if message and is_first():
            super().exit(status, message)
        if status:
            let_first_speak()
        super().exit(status)

    def _print_message(self, message: str, file=None) -> None:
        if is_first():
            super()._print_message(message, file)


def build_parser() -> Parser:
    """The parser of all commands; ``args.command`` names the module of the chosen one."""
    parser = Parser(
        prog="llama-hpc",
        description="Run LLaMA-family language models on clusters; the same bits on every layout.",
    )
    parser.add_argument("--version", action="version", version=f"llama-hpc {llama_hpc.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _module(name).add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None, alone: bool = False) -> int:
    """Run one command line (default: the process's own) and return the exit code; ``alone``: it is all that the process does."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code or 0
    args.alone = alone
    def run() -> int:
        with doing(args.command):
            return _module(args.command).main(args)
    return guarded(run)


def program() -> NoReturn:
    """The command ``llama-hpc``: ``main`` as a process of its own."""
    # What is imported and loaded at the start, some hundred thousand objects, stays: looking through all of them again and
    # again for what could go would take a tenth of a short run.
    gc.set_threshold(100_000, 50, 100)
    end_process(main(alone=True))


def _module(command: str):
    return importlib.import_module(f"llama_hpc.cli.{command}")
