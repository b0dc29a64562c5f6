"""A line now and then that tells that a job is alive, how fast it is, and how its first rank and node are."""

import logging
import time
from collections.abc import Sequence

from llama_hpc.runtime.devices import Choice
from llama_hpc.runtime.gpus import GpuMonitor, gpu_facts
from llama_hpc.runtime.health import device_facts, memory_text
from llama_hpc.runtime.progress import Progress

_LOG = logging.getLogger(__name__)


class Heartbeat:
    """Every ``interval`` seconds from the first look at it on; 0: never. ``devices``: those of the ranks of this node."""

    def __init__(self, interval: float, devices: Sequence[Choice] = ()):
        self._interval, self._devices = interval or float("inf"), devices
        self._monitors: list[GpuMonitor] | None = None
        self._last, self._tokens = 0.0, 0

    def due(self) -> bool:
        """Whether it is time for the next line."""
        now = time.monotonic()
        self._last = self._last or now
        return now - self._last >= self._interval

    def beat(self, tokens: int, progress: Progress) -> None:
        """Logs the line: so many ``tokens`` have come about since the start."""
        now = time.monotonic()
        # Fewer than before: what is loaded answers something else now, and counts anew.
        rate = (tokens - (self._tokens if tokens >= self._tokens else 0)) / (now - self._last)
        self._last, self._tokens = now, tokens
        if self._monitors is None:
            self._monitors = [GpuMonitor(device) for device in self._devices]
        _LOG.info("%s", "; ".join([f"alive: {rate:.1f} tokens/s, {progress.done} of {progress.total} {progress.unit}",
                                   f"memory: {memory_text()}", *device_facts(),
                                   *gpu_facts(self._monitors)]))
