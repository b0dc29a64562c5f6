"""When a run has to stop before its work is done: signals, a time limit, and the end that the scheduler has set."""

import logging
import os
import signal
import time

_LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_MARGIN = 60.0                  # seconds before the scheduler's end, for what is under way and for the output
_SAME = 3.0                     # seconds in which a launcher may pass on one wish to stop as several signals


def scheduler_end() -> float | None:
    """When the scheduler will end the job, in seconds of time.time(); None where its environment does not say."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() and int(text) else None


class Stop:
    """A context in which signals set ``reason`` instead of ending the process; a second one ends it at once.

    ``time_limit``: seconds from now on, or None. Signals are those of the process: the main thread enters and leaves. After a
    signal this stays so behind the context: one that a launcher repeats must not turn an orderly end into a failure.
    """

    def __init__(self, time_limit: float | None = None):
        self._reason, self._since = "", 0.0
        ends = [] if time_limit is None else [(time.time() + time_limit, f"the time limit of {time_limit:g} s")]
        if (end := scheduler_end()) is not None:
            ends.append((end - _MARGIN, f"the job's end in {_MARGIN:g} s"))
        self._end, self._why = min(ends, default=(float("inf"), ""))
        self._before: dict[int, object] = {}

    @property
    def reason(self) -> str:
        """Why to stop; empty while there is no reason to."""
        if not self._reason and time.time() >= self._end:
            self._reason = self._why
        return self._reason

    def ask(self, reason: str) -> None:
        """A reason to stop, from any thread."""
        self._reason = self._reason or reason

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items() if not self._since else ():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self._since:
            self._reason, self._since = self._reason or signal.Signals(number).name, now
            # Before the log is set up, every rank would print this.
            if _LOG.hasHandlers():
                _LOG.warning("%s: stopping at the next step; another one ends the job at once", self._reason)
        elif now - self._since > _SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
