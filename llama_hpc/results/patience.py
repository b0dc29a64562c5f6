"""Patience with a file system: what fails for a while is tried again, with growing pauses."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from llama_hpc.runtime.activity import beat

_LOG = logging.getLogger(__name__)
PATIENCE = 60.0                 # seconds in which a file system may come back
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0        # seconds between attempts
# What may pass: a disk or a quota that is full, a server or a device that is away, a mount point that is empty or read-only.
PASSING = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS, errno.ENOENT, errno.ENODEV, errno.ENXIO,
                     errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOLCK, errno.EAGAIN})
Result = TypeVar("Result")


class Patience:
    """``doing`` something (in words) that may fail for ``seconds``. ``tries`` counts attempts that failed, of all times."""

    def __init__(self, doing: str, seconds: float = PATIENCE):
        self.doing, self.seconds, self.tries = doing, seconds, 0
        self._since, self._pause = None, _FIRST_PAUSE

    def wait(self, error: OSError) -> None:
        """Returns when it is to be tried again. Raises the error where the patience is at an end."""
        self.tries += 1
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since + self._pause > self.seconds:
            raise error
        _LOG.warning("%s: %s: trying again in %.1f s", self.doing, error.strerror or error, self._pause)
        beat()
        time.sleep(self._pause)
        beat()
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def succeed(self) -> None:
        """It has worked."""
        if self._since is not None:
            _LOG.warning("%s: works again after %.1f s", self.doing, time.monotonic() - self._since)
        self._since, self._pause = None, _FIRST_PAUSE


def patiently(function: Callable[[], Result], doing: str, passing: frozenset[int] = PASSING) -> Result:
    """``function()``, tried again while it raises an OSError that may pass. Raises the last one where that takes too long, and
    other errors at once."""
    patience = Patience(doing, PATIENCE)
    while True:
        try:
            result = function()
        except OSError as error:
            if error.errno not in passing:
                raise
            patience.wait(error)
        else:
            patience.succeed()
            return result
