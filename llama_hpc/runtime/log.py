"""Log lines on standard error, from one rank: ``[    1.25 s] text``; on request in a file of each rank, and as JSON.

A file is ``FOLDER/rank-0003.log``, or ``rank-0003.jsonl`` with an object a line: ``time`` (ISO 8601, UTC), ``seconds`` since the
start, ``rank``, ``host``, ``level``, ``logger``, ``message`` and, for errors, ``exception``. It also gets what no terminal shows:
lines of level DEBUG, Python's warnings, and errors with their tracebacks. A later run goes on behind an earlier one.
"""

import json
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from llama_hpc.errors import UsageError
from llama_hpc.runtime.topology import hostname

_LOGGER = logging.getLogger("llama_hpc")
_WARNINGS = logging.getLogger("py.warnings")


class _Lines(logging.Formatter):
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


class _Json(_Lines):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": when, "seconds": round(record.created - self.start, 3), "rank": self.rank, "host": hostname(),
                  "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _Terminal(logging.StreamHandler):
    """Standard error; a progress bar there makes room for a line."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class _RankFile(logging.FileHandler):
    """The file of this rank. Once it cannot be written any more, the job goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        for logger in (_LOGGER, _WARNINGS):
            logger.removeHandler(self)
        _LOGGER.warning("cannot write %s any more: %s", self.baseFilename, sys.exc_info()[1])


def setup(rank: int, folder: str | None = None, as_json: bool = False) -> logging.Logger:
    """Send the records of ``llama_hpc`` and its modules to standard error and return that logger.

    Rank 0 shows INFO and above, the others WARNING and above. With a ``folder``, made if need be, everything also goes to the
    rank's file there. ``as_json``: lines are JSON, of the file if there is one, else those of standard error. May be called
    again: the last call counts. Raises UsageError where the file cannot be written.
    """
    for handler in _LOGGER.handlers:
        handler.close()
    made = _Json if as_json else _Lines
    terminal = _Terminal(sys.stderr)
    terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal.setFormatter(_Lines(rank) if folder else made(rank))
    handlers = [terminal]
    if folder:
        handlers.append(_rank_file(Path(folder) / f"rank-{rank:04}.{'jsonl' if as_json else 'log'}", folder))
        handlers[-1].setFormatter(made(rank))
    logging.captureWarnings(bool(folder))
    _LOGGER.handlers, _WARNINGS.handlers = handlers, handlers[:] if folder else []
    _LOGGER.setLevel(logging.DEBUG if folder else terminal.level)
    _LOGGER.propagate = _WARNINGS.propagate = False
    return _LOGGER


def become_first() -> None:
    """This rank speaks for the others from now on, as the first one has been lost."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _Terminal):
            handler.setLevel(logging.INFO)
    _LOGGER.setLevel(min(_LOGGER.level, logging.INFO))


def _rank_file(path: Path, folder: str) -> _RankFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _RankFile(path, mode="a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"--log-dir {folder}: cannot write {path}: {error.strerror}: give a folder in which all ranks may "
                         "write") from None


def keep_failure(error: BaseException) -> None:
    """Writes an error that ends this rank, with its traceback, into the rank's file, if it has one."""
    details = type(error), error, error.__traceback__
    record = _LOGGER.makeRecord(_LOGGER.name, logging.ERROR, __file__, 0, "%s", (error,), details)
    for handler in _LOGGER.handlers:
        # Another thread may hang while it writes a line.
        if isinstance(handler, _RankFile) and handler.lock.acquire(timeout=1):
            try:
                handler.emit(record)
            finally:
                handler.lock.release()
