"""``llama-hpc show``: a readable view of a result file."""

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
    parser.add_argument("results", metavar="RESULTS", help="HDF5 file written by llama-hpc run")
    parser.add_argument("--id", metavar="ID", help="only the prompt with this id")
    parser.add_argument("--limit", metavar="N", type=_count, help="only the first N prompts")
    parser.add_argument("--tokens", action="store_true", help="also show token ids and log-probabilities")
    parser.add_argument("--verify", action="store_true", help="compute the digest again and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the file and return 0.

    Raises ResultsError for a file that cannot be read or fails --verify, UsageError for an unknown id.
    """
    from llama_hpc.results import read_results

    # A terminal with a narrow encoding shows escapes instead of failing.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    with read_results(args.results) as results:
        rows = _rows(results, args)
        if args.verify:
            results.verify()
        try:
            (_print_json if args.json else _print_text)(results, rows, args)
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
    """The rows of the requests to show."""
    if args.id is not None:
        if args.id not in results.ids:
            raise UsageError(f"{results.path} has no prompt with the id {args.id!r}: it has {len(results.ids)} prompts")
        row = results.ids.index(args.id)
        return range(row, row + 1)
    return range(len(results.ids) if args.limit is None else min(args.limit, len(results.ids)))


def summary(results: Any) -> dict[str, Any]:
    """The header: what was run, where and how fast. Values are None where the provenance does not say.

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
        "prompts": len(results.ids),
        "answers": results.num_outputs,
        "tokens": results.num_tokens,
        "wall_seconds": seconds,
        "tokens_per_second": results.num_tokens / seconds if seconds else None,
        "digest": results.digest,
    }


def _seconds(start: Any, end: Any) -> float | None:
    from datetime import datetime

    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None


def _print_json(results: Any, rows: range, args: argparse.Namespace) -> None:
    import json

    entries = []
    for row in rows:
        for output in results.outputs_of(row):
            entry = {"id": results.ids[row], "sample": output.sample, "prompt": results.prompts[row]}
            entry.update(text=output.text, finish_reason=output.finish_reason)
            entry.update(num_tokens=len(output.tokens), timing=output.timing)
            if args.tokens:
                entry["tokens"] = output.tokens.tolist()
                entry["logprobs"] = _finite(output.logprobs)
                if output.top_tokens.size:
                    entry["top_tokens"] = output.top_tokens.tolist()
                    entry["top_logprobs"] = [_finite(row) for row in output.top_logprobs]
            entries.append(entry)
    document = {**summary(results), "verified": args.verify, "provenance": results.provenance, "outputs": entries}
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _finite(logprobs: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in logprobs.tolist()]


def _print_text(results: Any, rows: range, args: argparse.Namespace) -> None:
    import shutil

    # Piped output is not wrapped, so that grep sees whole lines.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in _header(results, args.verify):
        _print_wrapped(line, width, " " * 12)
    for row in rows:
        print()
        _print_wrapped(f"[{results.ids[row]}]", width)
        _print_block("prompt", results.prompts[row], width)
        outputs = results.outputs_of(row)
        if not outputs:
            print("  no answer in this file")
        for output in outputs:
            _print_output(output, len(outputs), width, args.tokens)


def _header(results: Any, verified: bool) -> list[str]:
    facts = summary(results)
    ranks = f" ({facts['ranks']} ranks)" if facts["ranks"] else ""
    counts = ", ".join(_counted(facts[name], name) for name in ("prompts", "answers", "tokens"))
    lines = [f"{results.path}: {facts['status']}, {counts}"]
    lines += [f"{name:<12}{facts[name]}" for name in ("model", "weights") if facts[name] is not None]
    if facts["grid"] is not None:
        lines.append(f"{'grid':<12}{facts['grid']}{ranks}")
    if facts["start_time"] is not None:
        lines.append(f"{'started':<12}{facts['start_time']}")
    if facts["wall_seconds"]:
        lines.append(f"{'wall time':<12}{facts['wall_seconds']:.2f} s, {facts['tokens_per_second']:.1f} tokens/s")
    return [*lines, f"{'digest':<12}{facts['digest']}{' (verified)' if verified else ''}"]


def _counted(number: int, plural: str) -> str:
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


def _print_output(output: Any, count: int, width: int | None, tokens: bool) -> None:
    _print_block("answer" if count == 1 else f"answer {output.sample}", output.text, width)
    times = [f"{name} {value:.3g} s" for name, value in output.timing.items()]
    facts = [_counted(len(output.tokens), "tokens"), f"finish: {output.finish_reason}", *times]
    _print_wrapped("  " + ", ".join(facts), width, "    ")
    if tokens and len(output.tokens):
        _print_wrapped("  tokens: " + _pairs(output.tokens, output.logprobs), width, "    ")
        for place, top in enumerate(zip(output.top_tokens, output.top_logprobs, strict=True) if output.top_tokens.size else ()):
            _print_wrapped(f"  likeliest at token {place}: " + _pairs(*top), width, "    ")


def _pairs(tokens: Any, logprobs: Any) -> str:
    return ", ".join(f"{token} ({logprob:.4f})" for token, logprob in zip(tokens, logprobs, strict=True))


def _print_block(label: str, text: str, width: int | None) -> None:
    """A label, then the text: on the same line where it is a single one, else indented below."""
    lines = text.strip("\n").split("\n")
    if len(lines) == 1:
        _print_wrapped(f"  {label}: {lines[0]}", width, "    ")
        return
    print(f"  {label}:")
    for line in lines:
        _print_wrapped(f"    {line}", width, "    ")


def _print_wrapped(line: str, width: int | None, indent: str = "") -> None:
    import textwrap

    # What a model wrote must not move the cursor or recolour the terminal.
    line = re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", lambda control: ascii(control[0])[1:-1], line)
    if width is None or len(line) <= width:
        print(line)
        return
    options = {"replace_whitespace": False, "break_on_hyphens": False, "subsequent_indent": indent}
    print("\n".join(textwrap.wrap(line, max(width, len(indent) + 10), **options)))
