"""What happened on the way and was made good: counted where it happens, told at the end, and kept in the result file.

Any rank counts in ``ModelJob.incidents``; the numbers of all ranks are added up.
"""

from collections.abc import Mapping, Sequence

from llama_hpc.engine.summary import RankReport

# What may be counted, by what became of it, and the words of the summary.
RETRIED = {"write_retries": "failed writes of answers", "went_on_without": "times what the loss of ranks had interrupted"}
LOST = {"ranks_lost": "ranks", "torn_bytes": "bytes of half written answers",
        "setbacks": "starts of sequences that were set back", "pressure": "shrinkings of the cache for want of memory"}
RESUMED = {"resumed_answers": "answers of earlier runs"}


def of_reports(ranks: Sequence[RankReport]) -> dict[str, int]:
    """What all ranks of a replica count alike, of all replicas."""
    work = [r.work for r in ranks if (r.stage, r.tensor) == (0, 0)]
    return {name: sum(own[name] for own in work) for name in ("setbacks", "pressure")}


def totals(counts: Mapping[str, int]) -> dict[str, int]:
    """Every name with its number, those that never happened too."""
    return {name: counts.get(name, 0) for names in (RETRIED, LOST, RESUMED) for name in names}


def lines(counts: Mapping[str, int]) -> list[str]:
    """A line for each kind of what happened, or one that says that nothing did."""
    found = []
    for kind, names in (("retried", RETRIED), ("lost", LOST), ("resumed", RESUMED)):
        told = [f"{counts[name]} {words}" for name, words in names.items() if counts.get(name)]
        if told:
            found.append(f"{kind}: {', '.join(told)}")
    return found or ["nothing was retried, lost or resumed"]
