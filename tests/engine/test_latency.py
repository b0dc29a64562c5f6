"""Latencies and targets: what is measured from when to when, what counts as met, and how limits follow."""

import numpy as np
import pytest

from llama_hpc.engine.adapt import LEAST, WINDOW, Adapter
from llama_hpc.engine.latency import Target, latencies, parse_targets, report
from llama_hpc.engine.scheduler import StepLimits
from llama_hpc.errors import UsageError
from llama_hpc.results.schema import Output


def output(arrival, start, first, end, tokens=5):
    return Output(0, 0, np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), "", "length",
                  {"arrival": arrival, "start": start, "first_token": first, "end": end})


def test_latencies_are_differences_of_times():
    found = latencies([output(1.0, 1.5, 2.5, 4.5), output(2.0, 2.0, 3.0, 3.0, tokens=1)])
    assert {name: values.tolist() for name, values in found.items() if name != "tpot"} == {
        "queue": [0.5, 0.0], "prefill": [1.0, 1.0], "ttft": [1.5, 1.0], "e2e": [3.5, 1.0]}
    assert found["tpot"][0] == 0.5 and np.isnan(found["tpot"][1])


def test_targets_are_parsed():
    text = "ttft.p99=1.5, prefill.p50=0.5,tpot.p99.9=.1,rps=8"
    assert parse_targets(text) == [
        Target("ttft", 99, 1.5), Target("prefill", 50, 0.5), Target("tpot", 99.9, 0.1), Target("rps", None, 8)]
    assert [str(target) for target in parse_targets(text)] == ["ttft.p99", "prefill.p50", "tpot.p99.9", "rps"]


@pytest.mark.parametrize("text", [
    "", "ttft", "ttft=1", "ttft.p99", "ttft.p0=1", "ttft.p100=1", "speed.p50=1", "rps.p50=3", "tpot.p50=-1", "tpot.p50=0",
    "rps=x", "ttft.p99=1;rps=8"])
def test_targets_that_do_not_parse(text):
    with pytest.raises(UsageError, match=r"--slo: .* is no target: give METRIC\.pN=SECONDS"):
        parse_targets(text)
    with pytest.raises(UsageError, match=r"gives ttft\.p50 twice"):
        parse_targets("ttft.p50=1,ttft.p50=2")


def test_percentiles_and_shares_of_requests():
    outputs = [output(0, 0, 0.01 * i, 10.0) for i in range(1, 101)]
    found = report(outputs, parse_targets("ttft.p50=0.6,ttft.p99=0.8,rps=5"))
    assert found.percentiles["ttft"] == pytest.approx([np.percentile(np.arange(1, 101) / 100, p) for p in (50, 90, 99)])
    assert [(str(t), round(value, 3), share) for t, value, share in found.targets] == [
        ("ttft.p50", 0.505, 0.6), ("ttft.p99", 0.99, 0.8), ("rps", 10.0, 1.0)]
    assert found.share == 0.6 and found.requests_per_second == 10
    lines = found.lines()
    assert lines[1] == "target ttft.p50=0.6: met with 0.505 (60.0 % of the requests within)"
    assert lines[2] == "target ttft.p99=0.8: MISSED with 0.99 (80.0 % of the requests within)"
    assert lines[3:] == ["target rps=5: met with 10", "60.0 % of the requests met all targets"]
    assert found.arrays()["targets"]["share"].tolist() == [0.6, 0.8, 1.0]


def observed(adapter, seconds, waited, windows=1):
    for _ in range(windows * WINDOW):
        limits = adapter.observe(seconds, waited)
    return limits


def test_late_steps_take_fewer_prompt_tokens_and_quick_ones_more_again():
    most = StepLimits(1000, 1000)
    adapter = Adapter(most, 8, [Target("tpot", 50, 0.1), Target("tpot", 99, 0.05)], 1)
    assert observed(adapter, 0.04, 0.03) == most
    assert observed(adapter, 0.06, 0.0) == StepLimits(708, 700)
    assert observed(adapter, 0.06, 0.0, 50) == StepLimits(LEAST + 8, LEAST)
    assert observed(adapter, 0.01, 0.0, 50) == most
    # With three steps under way a sequence gets a token from every third.
    assert observed(Adapter(most, 8, [Target("tpot", 50, 0.1)], 3), 0.04, 0.0).prefill < 1000


def test_waiting_stages_get_smaller_micro_batches():
    adapter = Adapter(StepLimits(600, 512, 3), 64, [], 2)
    assert observed(adapter, 0.1, 0.002) == StepLimits(576, 512, 3)
    assert observed(adapter, 0.1, 0.02) == StepLimits(358 + 64, 358, 3)
