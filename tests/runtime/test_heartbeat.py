"""The line that tells that a job is alive, and what it says of memory and devices."""

import re
from types import SimpleNamespace

import psutil
import pytest
from node_tree import write_files

from llama_hpc.runtime import health, heartbeat
from llama_hpc.runtime.heartbeat import Heartbeat
from llama_hpc.runtime.progress import Progress

GIB = 1 << 30


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_line_every_interval_with_the_rate_since_the_last(clock, monkeypatch, logged):
    monkeypatch.setattr(heartbeat, "device_facts", lambda: ["cpu 61 °C"])
    beats, progress = Heartbeat(60), Progress(200, "prompts", "answering", show=False)
    for seconds, tokens, done in ((0, 0, 0), (30, 500, 3), (60, 1200, 5), (90, 1500, 7), (120, 1800, 9)):
        clock.now = 100.0 + seconds
        progress.done = done
        if beats.due():
            beats.beat(tokens, progress)
    lines = [record.getMessage() for record in logged]
    assert [line.split("; ")[0] for line in lines] == ["alive: 20.0 tokens/s, 5 of 200 prompts",
                                                       "alive: 10.0 tokens/s, 9 of 200 prompts"]
    assert re.fullmatch(r"alive: .*; memory: rank [\d.]+ .iB, node [\d.]+ .iB of [\d.]+ .iB left; cpu 61 °C", lines[0])


def test_no_interval_no_line(clock):
    beats = Heartbeat(0)
    assert not beats.due()
    clock.now += 1e9
    assert not beats.due()


def test_the_tightest_limit_stands_for_the_node(monkeypatch):
    monkeypatch.setattr(health, "memory_limits", lambda: [(80 * GIB, 100 * GIB), (3 * GIB, 8 * GIB)])
    assert health.memory_text().endswith("node 3.00 GiB of 8.00 GiB left")


def test_devices_where_they_can_be_read(tmp_path, monkeypatch):
    sensor = SimpleNamespace
    found = {"coretemp": [sensor(current=54.0), sensor(current=61.4)], "nvme": [sensor(current=80.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    counts = {"mc0/ce_count": 2, "mc0/ue_count": 0, "mc1/ce_count": 3, "mc1/ue_count": 0}
    write_files(tmp_path, {f"sys/devices/system/edac/mc/{name}": count for name, count in counts.items()})
    assert health.device_facts(tmp_path) == ["cpu 61 °C", "5 corrected memory errors"]


def test_nothing_is_said_of_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    assert health.device_facts(tmp_path) == []
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert health.device_facts(tmp_path) == []
