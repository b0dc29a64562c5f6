"""How far a long step has come: a bar on a terminal, log lines otherwise."""

import logging
import sys
import time

from llama_hpc.runtime import activity

_LOGGER = logging.getLogger(__name__)


class Progress:
    """Counts ``update``s of a step of ``total`` ``unit``s and shows them on the rank that has ``show`` set.

    On a terminal it is a tqdm bar. Otherwise it logs a line at every tenth of the way, at most one a second, and
    one where nothing was said for a while: 10 s at first, each time half as long again, up to 5 minutes.
    """

    def __init__(self, total: int, unit: str, label: str, *, show: bool = True):
        self.total, self.unit, self.label = total, unit, label
        self.done = 0
        self._bar = None
        self._lines = False
        self._start = self._last = time.monotonic()
        self._last_done = 0
        self._silence = 10.0
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {unit}", desc=label, file=sys.stderr, dynamic_ncols=True)
        else:
            self._lines = show

    def update(self, n: int = 1) -> None:
        """``n`` more units are done."""
        self.done += n
        if n:
            activity.beat()
        if self._bar is not None:
            self._bar.update(n)
        elif self._lines:
            self._log_when_due()

    def close(self) -> None:
        """Show the final state. Harmless when repeated."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and (self.done > self._last_done or not self.done):
            self._log()
        self._bar, self._lines = None, False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _log_when_due(self) -> None:
        silent = time.monotonic() - self._last
        tenth = 10 * self.done // self.total > 10 * self._last_done // self.total if self.total else False
        if silent >= self._silence:
            self._silence = min(1.5 * self._silence, 300)
        elif not tenth or silent < 1:
            return
        self._log()

    def _log(self) -> None:
        self._last, self._last_done = time.monotonic(), self.done
        elapsed = self._last - self._start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        text = f"{self.label}: {self.done}/{self.total} {self.unit}"
        if self.total:
            text += f" ({100 * self.done // self.total} %)"
        if rate and elapsed >= 1:
            text += f", {rate:.3g} {self.unit}/s"
            if self.done < self.total:
                text += f", {_duration((self.total - self.done) / rate)} left"
        _LOGGER.info(text)


def _duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
