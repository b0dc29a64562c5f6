"""What the first rank of a job does while replicas work: it shows how far they are."""

import time

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.queue import ENDED, FINISHED, TOKENS
from llama_hpc.runtime.activity import doing
from llama_hpc.runtime.heartbeat import Heartbeat
from llama_hpc.runtime.progress import Progress

_POLL = 0.2                     # seconds between looks at the shared counters


class Watch:
    """Moves the progress bar of the first rank by the shared counters, and drives MPI for the others' one-sided calls."""

    def __init__(self, counters: SharedCounters, progress: Progress, heartbeat: Heartbeat):
        self.counters, self.progress, self.heartbeat, self._last = counters, progress, heartbeat, 0.0

    def __call__(self) -> None:
        self.counters.let_others()
        if time.monotonic() - self._last >= _POLL:
            self._look()

    def _look(self) -> None:
        self._last = time.monotonic()
        self.progress.update(self.counters.read(FINISHED) - self.progress.done)
        if self.heartbeat.due():
            self.heartbeat.beat(self.counters.read(TOKENS), self.progress)

    def until(self, replicas: int) -> None:
        """Waits until all replicas have ended; looks often, as the time until the last answer is measured."""
        with doing("waiting for other replicas", polls=True):
            while self.counters.read(ENDED) < replicas:
                time.sleep(0.01)
                self.counters.let_others()
                self._look()
        self._look()
