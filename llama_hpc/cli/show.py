"""``llama-hpc show``: a readable view of a result file or a file of scores."""

import argparse
import math
import os
import re
import sys
from typing import Any

from llama_hpc.errors import UsageError


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser("show", help="a readable view of a result file",
                                   description="A readable view of a result file.")
    parser.add_argument("results", metavar="RESULTS", help="HDF5 file written by llama-hpc run or score")
    parser.add_argument("--id", metavar="ID", help="only the prompt or document with this id")
    parser.add_argument("--limit", metavar="N", type=_count, help="only the first N prompts or documents")
    parser.add_argument("--tokens", action="store_true", help="also show token ids and log-probabilities")
    parser.add_argument("--verify", action="store_true", help="compute the digest again and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--status", action="store_true",
                        help="print one word only, for scripts: complete, incomplete (run --resume goes on) or running")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the file, or how far the job is that writes it, and return 0.

    Raises ResultsError for a file that cannot be read or fails --verify, UsageError for an unknown id.
    """
    from llama_hpc.results import Scores, read_output
    from llama_hpc.results.parts import ProgressFolder

    # A terminal with a narrow encoding shows escapes instead of failing.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    folder = ProgressFolder(args.results)
    running = folder.in_use()
    if running or (folder.path.is_dir() and not os.path.exists(args.results)):
        if args.status:
            print("running" if running else "incomplete")
        else:
            from llama_hpc.cli.show_progress import print_progress
            print_progress(folder, args)
        return 0
    with read_output(args.results) as results:
        if args.status:
            print(results.status)
            return 0
        rows = _rows(results, args)
        if args.verify:
            results.verify()
        as_json, as_text = print_json, print_text
        if isinstance(results, Scores):
            from llama_hpc.cli import show_scores
            as_json, as_text = show_scores.print_json, show_scores.print_text
        try:
            (as_json if args.json else as_text)(results, rows, args)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader (head, less) has seen enough; what Python flushes at exit must go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _rows(results: Any, args: argparse.Namespace) -> range:
    """The rows of the requests, or documents, to show."""
    if args.id is not None:
        if args.id not in results.ids:
            raise UsageError(f"{results.path} has nothing with the id {args.id!r}: it has {len(results.ids)} ids")
        row = results.ids.index(args.id)
        return range(row, row + 1)
    return range(len(results.ids) if args.limit is None else min(args.limit, len(results.ids)))


def summary(results: Any) -> dict[str, Any]:
    """The header of a result file: what was run, where and how fast."""
    counts = {"prompts": len(results.ids), "answers": results.num_outputs, "tokens": results.num_tokens}
    return origin(results, counts["tokens"]) | counts


def origin(results: Any, tokens: int) -> dict[str, Any]:
    """Where ``tokens`` come from, and how fast. Values are None where the provenance does not say.

    Uses the provenance entries ``model`` (a string, or a dictionary with ``path``), ``weights``, ``grid`` (a string, or
    a dictionary with ``data``, ``pipeline``, ``tensor``), ``ranks``, ``start_time``, and ``wall_seconds`` or else the
    time from ``start_time`` to ``end_time`` (ISO 8601).
    """
    facts = results.provenance
    model = facts.get("model")
    grid = facts.get("grid")
    if isinstance(grid, dict):
        grid = "x".join(str(grid.get(axis, 1)) for axis in ("data", "pipeline", "tensor"))
    seconds = facts.get("wall_seconds")
    if not isinstance(seconds, int | float):
        seconds = _seconds(facts.get("start_time"), facts.get("end_time"))
    return {
        "status": results.status,
        "model": model.get("path") if isinstance(model, dict) else model,
        "weights": facts.get("weights"),
        "grid": grid,
        "ranks": facts.get("ranks"),
        "start_time": facts.get("start_time"),
        "wall_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "digest": results.digest,
    }


def _seconds(start: Any, end: Any) -> float | None:
    from datetime import datetime

    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None


def print_json(results: Any, rows: range, args: argparse.Namespace) -> None:
    """All as one JSON document."""
    import json

    entries = []
    for row in rows:
        for output in results.outputs_of(row):
            entry = {"id": results.ids[row], "sample": output.sample, "prompt": results.prompts[row]}
            entry.update(text=output.text, finish_reason=output.finish_reason)
            entry.update(num_tokens=len(output.tokens), timing=output.timing)
            if args.tokens:
                entry["tokens"] = output.tokens.tolist()
                entry["logprobs"] = finite(output.logprobs.tolist())
                if output.top_tokens.size:
                    entry["top_tokens"] = output.top_tokens.tolist()
                    entry["top_logprobs"] = [finite(row) for row in output.top_logprobs.tolist()]
            entries.append(entry)
    document = {**summary(results), "verified": args.verify, "provenance": results.provenance, "outputs": entries}
    print(json.dumps(document, indent=2, ensure_ascii=False))


def finite(values: list[float]) -> list[float | None]:
    """None for what JSON has no number for."""
    return [value if math.isfinite(value) else None for value in values]


def terminal_width() -> int | None:
    """Columns; None for piped output, which is not wrapped, so that grep sees whole lines."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_text(results: Any, rows: range, args: argparse.Namespace) -> None:
    """Header, prompts and answers."""
    width, facts = terminal_width(), summary(results)
    print_header(results, facts, ", ".join(counted(facts[name], name) for name in ("prompts", "answers", "tokens")), args, width)
    for row in rows:
        print()
        print_wrapped(f"[{results.ids[row]}]", width)
        _print_block("prompt", results.prompts[row], width)
        outputs = results.outputs_of(row)
        if not outputs:
            print("  no answer in this file")
        for output in outputs:
            _print_output(output, len(outputs), width, args.tokens)


def print_header(results: Any, facts: dict[str, Any], counts: str, args: argparse.Namespace, width: int | None) -> None:
    """What the file holds, and where it comes from."""
    ranks = f" ({facts['ranks']} ranks)" if facts["ranks"] else ""
    lines = [f"{results.path}: {facts['status']}, {counts}"]
    lines += [f"{name:<12}{facts[name]}" for name in ("model", "weights") if facts[name] is not None]
    if facts["grid"] is not None:
        lines.append(f"{'grid':<12}{facts['grid']}{ranks}")
    if facts["start_time"] is not None:
        lines.append(f"{'started':<12}{facts['start_time']}")
    if facts["wall_seconds"]:
        lines.append(f"{'wall time':<12}{facts['wall_seconds']:.2f} s, {facts['tokens_per_second']:.1f} tokens/s")
    lines.append(f"{'digest':<12}{facts['digest']}{' (verified)' if args.verify else ''}")
    for line in lines:
        print_wrapped(line, width, " " * 12)


def counted(number: int, plural: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


def _print_output(output: Any, count: int, width: int | None, tokens: bool) -> None:
    _print_block("answer" if count == 1 else f"answer {output.sample}", output.text, width)
    times = [f"{name} {value:.3g} s" for name, value in output.timing.items()]
    facts = [counted(len(output.tokens), "tokens"), f"finish: {output.finish_reason}", *times]
    print_wrapped("  " + ", ".join(facts), width, "    ")
    if tokens and len(output.tokens):
        print_wrapped("  tokens: " + _pairs(output.tokens, output.logprobs), width, "    ")
        for place, top in enumerate(zip(output.top_tokens, output.top_logprobs, strict=True) if output.top_tokens.size else ()):
            print_wrapped(f"  likeliest at token {place}: " + _pairs(*top), width, "    ")


def _pairs(tokens: Any, logprobs: Any) -> str:
    return ", ".join(f"{token} ({logprob:.4f})" for token, logprob in zip(tokens, logprobs, strict=True))


def _print_block(label: str, text: str, width: int | None) -> None:
    """A label, then the text: on the same line where it is a single one, else indented below."""
    lines = text.strip("\n").split("\n")
    if len(lines) == 1:
        print_wrapped(f"  {label}: {lines[0]}", width, "    ")
        return
    print(f"  {label}:")
    for line in lines:
        print_wrapped(f"    {line}", width, "    ")


def print_wrapped(line: str, width: int | None, indent: str = "") -> None:
    """A line, wrapped at ``width`` (None: not)."""
    import textwrap

    # What a model wrote must not move the cursor or recolour the terminal.
    line = re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", lambda control: ascii(control[0])[1:-1], line)
    if width is None or len(line) <= width:
        print(line)
        return
    options = {"replace_whitespace": False, "break_on_hyphens": False, "subsequent_indent": indent}
    print("\n".join(textwrap.wrap(line, max(width, len(indent) + 10), **options)))
