"""Latencies of requests that arrive over time, and targets for them.

``queue``: from arrival to admission; ``prefill``: from there to the first token; ``ttft``: both (time to first token); ``tpot``:
time per output token after the first; ``e2e``: from arrival to the end. ``rps``: requests answered per second.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_hpc.errors import UsageError
from llama_hpc.results.schema import Output

METRICS = ("queue", "prefill", "ttft", "tpot", "e2e")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Target:
    """``limit`` seconds for a percentile of a metric; for ``rps`` the least number, without a percentile."""

    metric: str
    percentile: float | None
    limit: float

    def __str__(self) -> str:
        return self.metric if self.percentile is None else f"{self.metric}.p{self.percentile:g}"


def parse_targets(text: str) -> list[Target]:
    """From text such as ``ttft.p99=1.5,tpot.p50=0.05,rps=8``; raises UsageError."""
    targets = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(rps)|(\w+)\.p(\d+(?:\.\d+)?))=(\d+(?:\.\d*)?|\.\d+)", part.strip())
        metric = match and (match[1] or match[2])
        percentile = float(match[3]) if match and match[3] else None
        known = metric == "rps" if percentile is None else metric in METRICS and 0 < percentile < 100
        if not known or not float(match[4]):
            raise UsageError(f"--slo: {part.strip()!r} is no target: give METRIC.pN=SECONDS with {', '.join(METRICS)} and a "
                             "percentile below 100, or rps=NUMBER, separated by commas, such as ttft.p99=1.5,rps=8")
        targets.append(Target(metric, percentile, float(match[4])))
    names = [str(target) for target in targets]
    if len(set(names)) < len(names):
        raise UsageError(f"--slo gives {next(name for name in names if names.count(name) > 1)} twice")
    return targets


def latencies(outputs: Sequence[Output]) -> dict[str, np.ndarray]:
    """Seconds float64 [outputs] by metric; NaN for the time per output token of answers of one token."""
    names = ("arrival", "start", "first_token", "end")
    arrival, start, first, end = np.array([[output.timing[name] for output in outputs] for name in names])
    tokens = np.array([len(o.tokens) for o in outputs])
    tpot = np.where(tokens > 1, (end - first) / np.maximum(tokens - 1, 1), np.nan)
    return {"queue": start - arrival, "prefill": first - start, "ttft": first - arrival, "tpot": tpot, "e2e": end - arrival}


@dataclass(frozen=True)
class LatencyReport:
    """Percentiles of all metrics, and how targets were met: for each its value and the share of requests within it; ``share`` of
    all requests that are within all of them (``rps`` aside)."""

    percentiles: dict[str, list[float]]
    requests_per_second: float
    targets: list[tuple[Target, float, float]]
    share: float

    def lines(self) -> list[str]:
        """For the log."""
        names = "/".join(f"P{p}" for p in PERCENTILES)
        found = [f"{metric} {'/'.join(f'{value:.3g}' for value in values)}" for metric, values in self.percentiles.items()]
        lines = [f"latency in s, {names}: {', '.join(found)}; {self.requests_per_second:.2f} requests/s"]
        for target, value, share in self.targets:
            good = value >= target.limit if target.percentile is None else value <= target.limit
            within = "" if target.percentile is None else f" ({100 * share:.1f} % of the requests within)"
            lines.append(f"target {target}={target.limit:g}: {'met' if good else 'MISSED'} with {value:.3g}{within}")
        if self.targets:
            lines.append(f"{100 * self.share:.1f} % of the requests met all targets")
        return lines

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """For the group ``metrics`` of a result file."""
        tables = {"latency": {"percentile": np.array(PERCENTILES, np.float64)}
                  | {metric: np.array(values) for metric, values in self.percentiles.items()}}
        if self.targets:
            limits, values, shares = zip(*((target.limit, value, share) for target, value, share in self.targets), strict=True)
            tables["targets"] = {"limit": np.array(limits), "value": np.array(values), "share": np.array(shares)}
        return tables


def report(outputs: Sequence[Output], targets: Sequence[Target]) -> LatencyReport:
    """Of the outputs of a run with arrival times."""
    found = latencies(outputs)
    rate = len(outputs) / max(o.timing["end"] for o in outputs)
    def percentile(metric: str, which: float) -> float:
        return float(np.nanpercentile(found[metric], which)) if np.isfinite(found[metric]).any() else 0.0
    checked, within = [], np.ones(len(outputs), bool)
    for target in targets:
        if target.percentile is None:
            checked.append((target, rate, 1.0))
            continue
        good = ~(found[target.metric] > target.limit)
        within &= good
        checked.append((target, percentile(target.metric, target.percentile), float(good.mean())))
    table = {metric: [percentile(metric, p) for p in PERCENTILES] for metric in METRICS}
    return LatencyReport(table, rate, checked, float(within.mean()))
