"""Locks by flock(2), which end with the process that holds them: of a file, and of a folder, by a file ``lock`` in it."""

import contextlib
import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from llama_hpc.errors import ResultsError

_LOG = logging.getLogger(__name__)
LOOK = 0.2                      # seconds between looks at a lock


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file unless another process has it. A file system without locks leaves it unlocked, as if it were free."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _LOG.warning("this file system has no locks (%s): do not start two jobs with one output", error.strerror)
    return True


class LockedFolder:
    """The folder ``path``, which one job at a time uses for its ``output``."""

    def __init__(self, output: Path, path: Path):
        self.output, self.path = output, path
        self._lock: int | None = None

    def lock(self, holder: dict[str, Any], patience: float) -> None:
        """Makes the folder, and holds the job's lock until ``release``; ``holder`` is what others are told.

        Raises ResultsError where another job still has it after ``patience`` seconds.
        """
        end = time.monotonic() + patience
        try:
            while self._lock is None:
                self.path.mkdir(exist_ok=True)
                try:
                    descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:
                    # Another job has just ended, and removed the folder.
                    if not self.path.parent.is_dir():
                        raise
                    continue
                if try_lock(descriptor) and self._is_the_lock(descriptor):
                    self._lock = descriptor
                    break
                who = _holder(descriptor)
                os.close(descriptor)
                if time.monotonic() > end:
                    raise self._taken(who)
                time.sleep(LOOK)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise ResultsError(f"cannot keep progress in {self.path}: {error.strerror}") from None

    def check_free(self) -> None:
        """Changes nothing. Raises ResultsError where another job holds the lock now."""
        if self.in_use():
            with contextlib.suppress(FileNotFoundError), open(self.path / "lock", "rb") as lock:
                raise self._taken(_holder(lock.fileno()))

    def _taken(self, who: str) -> ResultsError:
        return ResultsError(f"{self.output} is being written by {who}: wait for its end, or give another output")

    def _is_the_lock(self, descriptor: int) -> bool:
        """Whether an open file is still the one that others find: a job that has ended removes its own."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / "lock"))
        return False

    @property
    def locked(self) -> bool:
        """Whether this process holds the job's lock."""
        return self._lock is not None

    def release(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def in_use(self) -> bool:
        """Whether a job holds the lock now."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who has the lock, as far as it says so."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(os.pread(descriptor, 1 << 16, 0))
        return ", ".join(f"{name} {value}" for name, value in holder.items())
    return "another job"
