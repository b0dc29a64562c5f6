"""Log lines on standard error, from one rank: ``[    1.25 s] text``."""

import logging
import sys
import time

_LOGGER = logging.getLogger("llama_hpc")


class _Formatter(logging.Formatter):
    """Seconds since the set-up, the level from WARNING on, and the rank of those that are not the first."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.start = time.time()

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = f"rank {self.rank}: " if self.rank else ""
        text = f"[{record.created - self.start:8.2f} s] {rank}{level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def setup(rank: int) -> logging.Logger:
    """Send the records of ``llama_hpc`` and its modules to standard error and return that logger.

    Rank 0 shows INFO and above, the others WARNING and above. May be called again: the last call counts.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(rank))
    _LOGGER.handlers = [handler]
    _LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _LOGGER.propagate = False
    return _LOGGER
