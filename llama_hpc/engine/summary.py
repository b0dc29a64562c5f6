"""What the ranks did, all together: lines for the log, arrays for the result file, events for a trace."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_hpc.engine.metrics import COUNTS, PHASES, RankMetrics, spread
from llama_hpc.runtime.tables import size

IMBALANCE = 0.05                # of the ranks' compute times, or the replicas' ends: more is worth a warning …
LONG = 5.0                      # … in runs of so many seconds
HEAT = 0.01                     # of a rank's time in which heat slows down its GPU: more is worth a warning


@dataclass(frozen=True)
class RankReport:
    """One rank's place in the grid, what it did (``Replica.work``) and where its time went."""

    data: int
    stage: int
    tensor: int
    work: dict
    metrics: RankMetrics


def summary(ranks: Sequence[RankReport]) -> tuple[list[str], list[str]]:
    """(lines, warnings) about a run; about one without any rank that has answered, none."""
    if not ranks:
        return [], []
    lines, warnings = [_times(ranks)], []
    # Of replicas that were lost, or smaller than others, there may be some ranks only.
    stages, replicas = sorted({r.stage for r in ranks}), sorted({r.data for r in ranks})
    if len(stages) > 1:
        shares = [_mean([r.metrics.bubble for r in ranks if r.stage == stage]) for stage in stages]
        lines.append(f"bubble (share of the time in which a stage waits): {', '.join(_percent(share) for share in shares)}")
    ends = [max(r.metrics.end for r in ranks if r.data == data) for data in replicas]
    if len(replicas) > 1:
        lines.append(f"replicas ended within {_percent(spread(ends))} of each other")
    computed = [r.metrics.totals["compute"] for r in ranks]
    if max(ends) >= LONG:
        if spread(ends) > IMBALANCE:
            warnings.append(f"replicas ended {_percent(spread(ends))} apart: the last prompts were long, or the nodes differ")
        if spread(computed) > IMBALANCE:
            low, high = (f(range(len(ranks)), key=computed.__getitem__) for f in (min, max))
            warnings.append(f"the ranks computed for unequal times, {_percent(spread(computed))} apart: rank {low} for "
                            f"{computed[low]:.1f} s, rank {high} for {computed[high]:.1f} s")
    told, wrong = _gpus(ranks)
    return lines + _cache(ranks) + _traffic(ranks) + told, warnings + wrong


def _times(ranks: Sequence[RankReport]) -> str:
    def shares(*phases: str) -> list[float]:
        return [sum(r.metrics.totals[p] for p in phases) / r.metrics.seconds if r.metrics.seconds else 0.0 for r in ranks]
    compute = shares("compute")
    others = {"reduce": ("reduce",), "wait": ("outcome", "receive"), "send": ("send",),
              "schedule and sample": ("schedule", "gather", "decide")}
    return (f"time of the ranks: compute {_percent(_mean(compute))} ({_percent(min(compute))} to {_percent(max(compute))}), "
            + ", ".join(f"{name} {_percent(_mean(shares(*phases)))}" for name, phases in others.items()))


def _cache(ranks: Sequence[RankReport]) -> list[str]:
    """One line, of what every rank of a replica did alike."""
    leaders = [r.work for r in ranks if (r.stage, r.tensor) == (0, 0)]
    if not leaders:
        return []
    ran, shared, setbacks = (sum(work[name] for work in leaders) for name in ("tokens", "shared_tokens", "setbacks"))
    used = max(work["pages_used"] / work["pages"] for work in leaders)
    return [f"{ran} tokens run, {shared} found in the cache, {setbacks} sequences set back, {_percent(used)} of the cache used"]


def _traffic(ranks: Sequence[RankReport]) -> list[str]:
    """Bytes sent to other stages for each token that was run, and into reductions for each number; how many of these travelled
    while their rank computed."""
    lines = []
    tokens = sum(r.work["tokens"] for r in ranks if (r.stage, r.tensor) == (0, 0))
    sent, reduced, numbers = (sum(r.work[name] for r in ranks) for name in ("bytes_sent", "reduce_bytes", "reduce_numbers"))
    if sent:
        lines.append(f"{sent / 1e6:.1f} MB between stages, {sent / max(1, tokens):.0f} bytes a token")
    if reduced:
        lines.append(f"{reduced / 1e6:.1f} MB into reductions ({', '.join(sorted({r.work['reduce'] for r in ranks}))}), "
                     f"{reduced / numbers:.2f} bytes a number, from each rank")
    made, overlapped = (sum(r.work[name] for r in ranks) for name in ("reductions", "overlapped_reductions"))
    if overlapped:
        lines.append(f"{_percent(overlapped / made)} of the reductions overlapped with computing, "
                     f"{_mean([r.work['reduce_seconds'] for r in ranks]):.2f} s waited for all of them on each rank")
    return lines


def _gpus(ranks: Sequence[RankReport]) -> tuple[list[str], list[str]]:
    """(a line about how the GPUs are at the end, warnings of memory errors and of heat)."""
    def told(name: str) -> list[float]:
        return [r.work[name] for r in ranks if name in r.work]
    parts, warnings = [], []
    if found := told("gpu_temperature"):
        parts.append(f"{_span(found)} °C")
    if found := told("gpu_memory"):
        parts.append(f"up to {size(max(found))} used")
    if found := told("gpu_clock"):
        parts.append(f"{_span(found)} MHz")
    if limited := [r.work["gpu_power_seconds"] / r.metrics.seconds for r in ranks
                   if r.metrics.seconds and "gpu_power_seconds" in r.work]:
        parts.append(f"at their power limit for {_percent(_mean(limited))} of the time")
    for rank, report in enumerate(ranks):
        work, seconds = report.work, report.metrics.seconds
        errors = [f"{work[name]:.0f} {kind}" for kind in ("corrected", "uncorrected")
                  if work.get(name := f"gpu_{kind}_errors")]
        if errors:
            warnings.append(f"the GPU of rank {rank} had {' and '.join(errors)} memory errors: have its node looked at")
        if (hot := work.get("gpu_heat_seconds", 0)) > HEAT * seconds:
            warnings.append(f"heat slowed down the GPU of rank {rank} for {hot:.1f} s of {seconds:.1f} s: its node lacks cooling")
    return [f"GPUs: {', '.join(parts)}"] if parts else [], warnings


def arrays(ranks: Sequence[RankReport]) -> dict[str, dict[str, np.ndarray]]:
    """The group ``metrics`` of a result file: ``ranks``, one value a rank, and ``steps``, one a recorded step of a rank."""
    if not ranks:
        return {}
    found = [r.metrics for r in ranks]
    table = {phase: np.array([m.totals[phase] for m in found]) for phase in PHASES}
    for name in ("seconds", "end", "bubble", "utilisation", "peak_memory", "stride"):
        table[name] = np.array([getattr(m, name) for m in found])
    # Some ranks have a GPU, and others may have none.
    for name in dict.fromkeys(name for r in ranks for name, value in r.work.items() if not isinstance(value, str)):
        table[name] = np.array([r.work.get(name, np.nan) for r in ranks])
    steps = {"rank": np.concatenate([np.full(len(m.starts), rank, np.int32) for rank, m in enumerate(found)]),
             "start": np.concatenate([m.starts for m in found])}
    for i, phase in enumerate(PHASES):
        steps[phase] = np.concatenate([m.phases[:, i] for m in found])
    for i, count in enumerate(COUNTS):
        steps[count] = np.concatenate([m.counts[:, i] for m in found])
    return {"ranks": table, "steps": steps}


def trace(ranks: Sequence[RankReport]) -> str:
    """The recorded steps as JSON in the Trace Event Format, which chrome://tracing and ui.perfetto.dev open: a process for each
    replica, a thread for each rank of it."""
    events = []
    for rank, report in enumerate(ranks):
        where = {"pid": report.data, "tid": rank}
        events.append({"ph": "M", "name": "process_name", "pid": report.data, "args": {"name": f"replica {report.data}"}})
        events.append({"ph": "M", "name": "thread_name", **where,
                       "args": {"name": f"rank {rank}: stage {report.stage}, tensor {report.tensor}"}})
        m = report.metrics
        for start, phases, counts in zip(m.starts.tolist(), m.phases.tolist(), m.counts.tolist(), strict=True):
            seconds = dict(zip(PHASES, phases, strict=True))
            # Joins happen in the midst of computing.
            reduce = seconds.pop("reduce")
            seconds["compute"] += reduce
            for phase, duration in seconds.items():
                if duration > 0:
                    args = {**dict(zip(COUNTS, counts, strict=True)), "reduce_us": reduce * 1e6} if phase == "compute" else {}
                    events.append({"ph": "X", "name": phase, **where, "ts": start * 1e6, "dur": duration * 1e6, "args": args})
                start += duration
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
