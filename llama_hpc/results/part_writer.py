"""A replica's own file of finished answers, written beside the work: handed over at once, on disk within seconds."""

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from llama_hpc.errors import ResultsError

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0        # seconds between attempts to write


class PartWriter:
    """Appends records to a new file; a thread of its own writes them and syncs them every ``interval`` seconds.

    A file system that fails is tried again with growing pauses for ``patience`` seconds; what has not been synced is kept in
    memory and written anew. Then it goes to a file of the same name in the folder ``rescue``, if there is one, and the next
    ``append`` or ``close`` raises ResultsError. ``retries`` counts failed attempts. ``lock(descriptor)`` is called for the open
    file.

    Raises ResultsError where the file cannot be made.
    """

    def __init__(self, path: Path, header: bytes, interval: float, patience: float = 60.0, rescue: Path | None = None,
                 lock=lambda descriptor: None):
        self.path, self.retries = path, 0
        self._interval, self._patience, self._rescue, self._lock = interval, patience, rescue, lock
        self._header, self._synced = header, 0      # bytes of the file that are safe
        self._kept: list[bytes] = []                # records behind them, written or not
        self._written = 0                           # of which so many are in the file
        self._error: ResultsError | None = None
        self._closing = False
        self._changed = threading.Condition()
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._lock(self._file)
        except OSError as error:
            raise ResultsError(f"cannot write {path}: {error.strerror}: all nodes must be able to write to that folder") from None
        self._kept.append(header)
        self._thread = threading.Thread(target=self._run, name="part writer", daemon=True)
        self._thread.start()

    def append(self, record: bytes) -> None:
        """Takes over a record. Raises ResultsError once writing has failed for good."""
        with self._changed:
            if self._error:
                raise self._error
            self._kept.append(record)
            self._changed.notify_all()

    def settle(self) -> None:
        """Returns when all records are in the file, for other processes to read. Raises ResultsError once writing has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._written == len(self._kept))
            if self._error:
                raise self._error

    def close(self) -> None:
        """Returns when all records are safe. Raises ResultsError where they are not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.close(self._file)
        if self._error:
            raise self._error

    def _run(self) -> None:
        last, failing_since, pause = time.monotonic(), None, _FIRST_PAUSE
        while True:
            with self._changed:
                if not self._closing and self._written == len(self._kept):
                    # With something to sync not for ever.
                    self._changed.wait(self._interval if self._kept else None)
                closing, records = self._closing, list(self._kept)
            try:
                self._write(records)
                if closing or time.monotonic() - last >= self._interval:
                    self._sync(len(records))
                    last = time.monotonic()
                    if closing:
                        return
                failing_since, pause = None, _FIRST_PAUSE
            except OSError as error:
                self.retries += 1
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since + pause > self._patience:
                    self._give_up(error)
                    return
                _LOG.warning("cannot write %s: %s: trying again in %.1f s", self.path, error.strerror, pause)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._begin_again()

    def _write(self, records: list[bytes]) -> None:
        if self._written == len(records):
            return
        data = memoryview(b"".join(records[self._written :]))
        while data:
            data = data[os.write(self._file, data) :]
        with self._changed:
            self._written = len(records)
            self._changed.notify_all()

    def _sync(self, count: int) -> None:
        os.fsync(self._file)
        with self._changed:
            self._synced += sum(map(len, self._kept[:count]))
            del self._kept[:count]
            self._written = 0

    def _begin_again(self) -> None:
        """Behind what is safe; a file system that was away wants the file to be opened anew."""
        self._written = 0
        with contextlib.suppress(OSError):
            # What is safe lies in the file: one that has vanished must not come back without it.
            again = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(again, self._file, inheritable=False)
            os.close(again)
            self._lock(self._file)
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._synced)
            os.lseek(self._file, self._synced, os.SEEK_SET)

    def _give_up(self, error: OSError) -> None:
        with self._changed:
            count = len(self._kept) - (self._synced == 0)
            cure, where = "make room or mend the file system, then run again with --resume", ""
            if self._rescue and self._kept:
                records = self._kept if self._synced == 0 else [self._header, *self._kept]
                try:
                    (self._rescue / self.path.name).write_bytes(b"".join(records))
                    where = f"; {count} finished answers are in {self._rescue / self.path.name}"
                    cure = f"{cure} --rescue {self._rescue}"
                except OSError as second:
                    where = f"; {count} finished answers are lost, as {self._rescue} failed too: {second.strerror}"
            elif count:
                where = f"; {count} finished answers that were not yet on disk will be computed again"
            self._error = ResultsError(f"cannot write {self.path}: {error.strerror}, tried {self.retries} times{where}: {cure}")
            self._changed.notify_all()
