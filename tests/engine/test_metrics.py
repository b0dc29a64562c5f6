"""Where the time goes: phases add up, long runs are thinned without losing a second, and what is shown says what was measured."""

import json
import sys
import time

import numpy as np
import pytest

from llama_hpc.engine import metrics
from llama_hpc.engine.metrics import PHASES, Recorder, spread
from llama_hpc.engine.summary import RankReport, arrays, summary, trace

WORK = {"steps": 10, "tokens": 1000, "shared_tokens": 160, "setbacks": 2, "pages": 40, "pages_used": 10, "bytes_sent": 0,
        "reduce": "mpi", "reductions": 0, "overlapped_reductions": 0, "reduce_numbers": 0, "reduce_bytes": 0,
        "reduce_seconds": 0.0}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 10**9
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now)

    def spend(self, recorder, phase, milliseconds):
        self.now += int(milliseconds * 1e6)
        recorder.lap(phase)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def record(clock, steps, reduce=2.0):
    """A rank whose every step waits 3 ms, plans 1, computes 10 of which ``reduce`` in joins, and samples 1."""
    reduced = np.zeros(1, np.int64)
    recorder = Recorder(1.0, [reduced])
    for step in range(steps):
        recorder.begin()
        clock.spend(recorder, "outcome", 3)
        clock.spend(recorder, "schedule", 1)
        reduced += int(reduce * 1e6)
        clock.spend(recorder, "compute", 10)
        clock.spend(recorder, "decide", 1)
        recorder.end((step, 0, 1, 2, 3))
    return recorder.result()


def report(found, data=0, stage=0, tensor=0, **work):
    return RankReport(data, stage, tensor, WORK | work, found)


def test_phases_add_up(clock):
    found = record(clock, 20)
    expected = {"outcome": 0.06, "schedule": 0.02, "compute": 0.16, "reduce": 0.04, "decide": 0.02}
    assert found.totals == pytest.approx({phase: expected.get(phase, 0.0) for phase in PHASES})
    assert found.seconds == found.end == pytest.approx(0.3)
    assert (found.bubble, found.utilisation) == pytest.approx((0.2, 0.16 / 0.3))
    assert found.phases.sum() == pytest.approx(0.3) and found.starts.tolist() == pytest.approx([0.015 * i for i in range(20)])
    assert found.counts.tolist() == [[step, 0, 1, 2, 3] for step in range(20)] and found.peak_memory > 1 << 20


def test_long_runs_are_thinned_and_their_sums_exact(clock, monkeypatch):
    monkeypatch.setattr(metrics, "_KEPT", 8)
    found = record(clock, 100)
    assert found.stride == 16 and found.counts[:, 0].tolist() == list(range(0, 100, 16))
    assert found.totals["compute"] == pytest.approx(0.8) and found.seconds == pytest.approx(1.5)


def test_recording_is_a_handful_of_calls():
    """Of Python and of C, one reading of the clock a phase: 2 us a step, of which the shortest of a 135 M model takes 2.5 ms."""
    recorder, calls = Recorder(time.monotonic(), [np.zeros(1, np.int64)]), []
    def step():
        recorder.begin()
        for phase in PHASES:
            recorder.lap(phase)
        recorder.end((1, 0, 1, 0, 3))
    step()
    sys.setprofile(lambda frame, event, function: calls.append(event))
    step()
    sys.setprofile(None)
    # Of Python: step, begin, laps, end. Of C: the clock for all but the last, and the end of the profile.
    assert calls.count("call") == 3 + len(PHASES)
    assert calls.count("c_call") <= 1 + len(PHASES) + 1


def on_gpu(found, **work):
    """A report of a rank with a GPU."""
    health = {"gpu_temperature": 60.0, "gpu_memory": 30 * 2.0**30, "gpu_clock": 1980.0, "gpu_corrected_errors": 0,
              "gpu_uncorrected_errors": 0, "gpu_heat_seconds": 0.0, "gpu_power_seconds": 0.0}
    return report(found, **health | work)


def test_the_summary_tells_how_gpus_are(clock):
    """What is usual in a line, memory errors and heat as warnings; nothing of jobs without GPUs."""
    found = record(clock, 100)      # 1.5 s
    lines, warnings = summary([on_gpu(found), on_gpu(found, gpu_temperature=71.0, gpu_clock=1755.0, gpu_power_seconds=0.3)])
    assert lines[-1] == "GPUs: 60 to 71 °C, up to 30.00 GiB used, 1755 to 1980 MHz, at their power limit for 10.0 % of the time"
    assert warnings == [] and not any("GPU" in line for line in summary([report(found)])[0])
    ailing = on_gpu(found, gpu_corrected_errors=3, gpu_uncorrected_errors=1, gpu_heat_seconds=0.3)
    lines, warnings = summary([report(found), ailing])
    assert lines[-1].startswith("GPUs: 60 °C, up to 30.00 GiB used, 1980 MHz")
    assert warnings == ["the GPU of rank 1 had 3 corrected and 1 uncorrected memory errors: have its node looked at",
                        "heat slowed down the GPU of rank 1 for 0.3 s of 1.5 s: its node lacks cooling"]
    assert summary([on_gpu(found, gpu_heat_seconds=0.001)])[1] == []
    # NVML does not tell everything of every GPU.
    assert summary([report(found, gpu_temperature=60.0)])[0][-1] == "GPUs: 60 °C"


def test_metrics_of_ranks_with_and_without_a_gpu(clock):
    table = arrays([report(record(clock, 2)), on_gpu(record(clock, 2))])["ranks"]
    assert np.isnan(table["gpu_temperature"][0]) and table["gpu_temperature"][1] == 60
    assert table["steps"].dtype.kind == "i"
    assert not any(name.startswith("gpu") for name in arrays([report(record(clock, 2))])["ranks"])


def test_the_summary_names_bubbles_balance_and_traffic(clock):
    traffic = {"bytes_sent": 500_000, "reduce": "shared", "reduce_numbers": 1000, "reduce_bytes": 7900}
    ranks = [report(record(clock, 20), stage=stage, **(traffic if stage == 0 else {})) for stage in range(2)]
    lines, warnings = summary(ranks)
    text = "\n".join(lines)
    assert "compute 53.3 %" in text and "reduce 13.3 %" in text and "wait 20.0 %" in text
    assert "bubble (share of the time in which a stage waits): 20.0 %, 20.0 %" in text
    assert "1000 tokens run, 160 found in the cache, 2 sequences set back, 25.0 % of the cache used" in text
    assert "0.5 MB between stages, 500 bytes a token" in text and "(mpi, shared), 7.90 bytes a number" in text
    assert "overlapped" not in text and not warnings


def test_the_summary_names_reductions_that_travelled_while_ranks_computed(clock):
    work = {"reduce_bytes": 7900, "reduce_numbers": 1000, "reductions": 40, "overlapped_reductions": 30, "reduce_seconds": 0.25}
    lines, _ = summary([report(record(clock, 20), tensor=tensor, **work) for tensor in range(2)])
    assert "75.0 % of the reductions overlapped with computing, 0.25 s waited for all of them on each rank" in lines


@pytest.mark.parametrize(("steps", "warned"), [((400, 500), 2), ((500, 500), 0), ((4, 5), 0)])
def test_uneven_long_runs_are_warned_of(monkeypatch, steps, warned):
    ranks = [report(record(Clock(monkeypatch), count), data=data) for data, count in enumerate(steps)]
    lines, warnings = summary(ranks)
    assert len(warnings) == warned
    assert f"replicas ended within {100 * spread(steps):.1f} % of each other" in lines


def test_tables_of_the_file(clock):
    tables = arrays([report(record(clock, n), data=n) for n in (2, 3)])
    assert tables["ranks"]["compute"].tolist() == pytest.approx([0.016, 0.024])
    assert tables["ranks"]["setbacks"].tolist() == [2, 2] and "reduce" in tables["ranks"]
    assert tables["steps"]["rank"].tolist() == [0, 0, 1, 1, 1]
    assert tables["steps"]["rows"].tolist() == [0, 1, 0, 1, 2]


def test_the_trace_is_a_timeline(clock):
    events = json.loads(trace([report(record(clock, 2), tensor=t) for t in range(2)]))["traceEvents"]
    names = {(e["name"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and "tid" in e}
    assert names == {("thread_name", 0): "rank 0: stage 0, tensor 0", ("thread_name", 1): "rank 1: stage 0, tensor 1"}
    first = [(e["name"], round(e["ts"]), round(e["dur"])) for e in events if e["ph"] == "X" and e["tid"] == 0]
    step = [("outcome", 0, 3000), ("schedule", 3000, 1000), ("compute", 4000, 10000), ("decide", 14000, 1000)]
    assert first == step + [(name, 15000 + at, length) for name, at, length in step]
