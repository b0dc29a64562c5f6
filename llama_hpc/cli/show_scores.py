"""What ``llama-hpc show`` says of a file of scores."""

import argparse
import json
from typing import Any

from llama_hpc.cli.show import counted, finite, origin, print_header, print_wrapped, terminal_width
from llama_hpc.results import Scores


def print_json(scores: Scores, rows: range, args: argparse.Namespace) -> None:
    """All as one JSON document."""
    entries = []
    for document in scores.documents(rows):
        entry = {"id": document.id, "num_tokens": len(document.tokens)} | _sums(document.totals)
        if args.tokens:
            entry |= {"tokens": document.tokens.tolist(), "logprobs": finite(document.logprobs.tolist())}
        entries.append(entry)
    header = {**origin(scores, scores.totals.scored), "documents": len(scores.ids), "window": scores.window,
              "stride": scores.stride, **_sums(scores.totals), "verified": args.verify, "provenance": scores.provenance}
    print(json.dumps(header | {"scores": entries}, indent=2, ensure_ascii=False))


def _sums(totals: Any) -> dict[str, Any]:
    (perplexity,) = finite([totals.perplexity])
    return {"scored": totals.scored, "log_likelihood": totals.log_likelihood, "perplexity": perplexity}


def print_text(scores: Scores, rows: range, args: argparse.Namespace) -> None:
    """Header, then a line for each document, with --tokens its tokens."""
    width, totals = terminal_width(), scores.totals
    counts = f"{counted(len(scores.ids), 'documents')}, {counted(totals.scored, 'tokens')} scored"
    print_header(scores, origin(scores, totals.scored), counts, args, width)
    print_wrapped(f"{'perplexity':<12}{totals.perplexity:.6g} (windows of {scores.window} tokens, one every {scores.stride})",
                  width, " " * 12)
    print()
    for document in scores.documents(rows):
        totals = document.totals
        print_wrapped(f"[{document.id}] {counted(totals.scored, 'tokens')} scored, log-likelihood {totals.log_likelihood:.6g}, "
                      f"perplexity {totals.perplexity:.6g}", width, "    ")
        if args.tokens:
            pairs = [str(token) if logprob != logprob else f"{token} ({logprob:.4f})"
                     for token, logprob in zip(document.tokens, document.logprobs, strict=True)]
            print_wrapped("  tokens: " + ", ".join(pairs), width, "    ")
