"""How far a job is whose output is not there yet, or that runs on an output with a part of the answers."""

import argparse
import json
from datetime import UTC, datetime
from typing import Any

from llama_hpc.cli.show import print_wrapped, terminal_width
from llama_hpc.results.parts import ProgressFolder


def progress(folder: ProgressFolder) -> dict[str, Any]:
    """Facts about a job that was begun. ``running``: whether it has its lock; rates and times are None where it has none.

    Raises ResultsError for progress that cannot be read.
    """
    identity = folder.identity() or {}
    found = folder.read(identity)
    total, running = identity.get("answers"), folder.in_use()
    last = found.runs[-1] if found.runs else {}
    count = len(found.outputs)
    facts = {"output": str(folder.output), "running": running, "answers": count, "of": total, "runs": len(found.runs),
             "tokens": sum(len(output.tokens) for output in found.outputs), "grid": last.get("grid"), "ranks": last.get("ranks"),
             "start_time": last.get("start_time"), "answers_per_second": None, "seconds_left": None, "torn_bytes": found.torn}
    if running and last:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(last["start_time"])).total_seconds()
        facts["answers_per_second"] = rate = last["answers"] / max(seconds, 1e-3)
        facts["seconds_left"] = (total - count) / rate if rate and total is not None else None
    return facts


def print_progress(folder: ProgressFolder, args: argparse.Namespace) -> None:
    """The facts, as text or with --json as JSON."""
    facts, width = progress(folder), terminal_width()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    state = "running" if facts["running"] else "not running: --resume goes on"
    of = "" if facts["of"] is None else f" of {facts['of']}"
    lines = [f"{facts['output']}: {state}, {facts['answers']}{of} answers with {facts['tokens']} tokens, {facts['runs']} runs"]
    if facts["grid"]:
        lines.append(f"{'last run':<12}grid {facts['grid']} ({facts['ranks']} ranks), started {facts['start_time']}")
    if facts["answers_per_second"]:
        left = "" if facts["seconds_left"] is None else f", {facts['seconds_left']:.0f} s left"
        lines.append(f"{'rate':<12}{facts['answers_per_second']:.3g} answers/s{left}")
    for line in lines:
        print_wrapped(line, width, " " * 12)
