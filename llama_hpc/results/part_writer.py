"""A replica's own file of finished answers, written beside the work: handed over at once, on disk within seconds."""

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llama_hpc.errors import ResultsError
from llama_hpc.results import patience
from llama_hpc.results.part_file import PartFile
from llama_hpc.results.patience import Patience


class PartWriter:
    """Appends records to a new file, made for the first one; a thread of its own writes them and syncs them every ``interval``
    seconds.

    A file system that fails is tried again with growing pauses; what has not been synced is kept in memory and written anew.
    When the patience is at an end, ``failed()`` is called, and everything that is not safe goes to a file in the folder
    ``rescue``, if there is one, as does what is appended from then on. Then ``settle`` and ``close`` raise ResultsError.
    ``retries`` counts failed attempts. ``lock(descriptor)`` is called for the open file.
    """

    def __init__(self, path: Path, header: bytes, interval: float, rescue: Path | None = None,
                 lock: Callable[[int], object] = lambda descriptor: None, failed: Callable[[], None] = lambda: None):
        self.path, self.retries = path, 0
        self._interval, self._rescue, self._failed = interval, rescue, failed
        self._header, self._part = header, PartFile(path, header, lock)
        self._kept: list[bytes] = []                # records that are not safe, written or not
        self._written = self._safe = 0              # of which so many are in the file; records that are safe there
        self._amiss = False                         # whether that does not count, as something has failed since
        # Once writing has failed for good: why; records that were safe, and can be had again, or not; why not in ``rescue``.
        self._why, self._salvaged, self._gone, self._why_not_rescued = "", 0, 0, ""
        self._closing = self._over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="part writer", daemon=True)
        self._thread.start()

    def append(self, record: bytes) -> None:
        """Takes over a record."""
        with self._changed:
            self._kept.append(record)
            self._changed.notify_all()

    def settle(self) -> None:
        """Returns when all records are in the file, for other processes to read. Raises ResultsError where they are not."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._written == len(self._kept))
        self._check()

    def close(self) -> None:
        """Returns when all records are safe. Raises ResultsError where they are not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._part.close()
        self._check()

    def _check(self) -> None:
        if not self._why:
            return
        count = self._salvaged + self._safe + len(self._kept)
        cure = "make room or mend the file system, then run again with --resume"
        what = f"; {self._gone} answers that were safe in it are lost" if self._gone else ""
        if self._rescue and not self._over:
            what += f"; {count} finished answers are in {self._part.path}"
            cure += f" --rescue {self._rescue}"
        elif self._rescue:
            what += f"; {count} finished answers are lost, as {self._rescue} failed too: {self._why_not_rescued}"
        elif count:
            what += f"; {count} finished answers that were not yet on disk will be computed again"
        raise ResultsError(f"cannot write {self.path}: {self._why}, tried {self.retries} times{what}: {cure}")

    def _run(self) -> None:
        try:
            try:
                self._serve(patience.PATIENCE)
            except OSError as error:
                self._give_up(error)
                if self._rescue is None:
                    raise
                self._serve(0)
        except OSError as error:
            with self._changed:
                self._why_not_rescued, self._over = error.strerror or str(error), True
                self._changed.notify_all()

    def _serve(self, seconds: float) -> None:
        """Writes until all is safe that there will ever be. Raises OSError when that has failed for so many seconds."""
        last, patient = time.monotonic(), Patience(f"cannot write {self._part.path}", seconds)
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
                patient.succeed()
            except OSError as error:
                self.retries += 1
                self._amiss, self._written = True, 0
                patient.wait(error)

    def _write(self, records: list[bytes]) -> None:
        if self._amiss:
            self._part.go_back()
            self._amiss = False
        if self._written == len(records):
            return
        if not self._part.is_open:
            self._part.open()
        self._part.write(b"".join(records[self._written :]))
        with self._changed:
            self._written = len(records)
            self._changed.notify_all()

    def _sync(self, count: int) -> None:
        if self._part.is_open:
            self._part.sync()
        with self._changed:
            self._safe += count
            del self._kept[:count]
            self._written = 0

    def _give_up(self, error: OSError) -> None:
        """Turns to the second place, with all that cannot be had in the first one any more."""
        part, safe = self._part, self._safe
        vanished = safe > 0 and not part.in_place()
        content = part.salvage() if vanished else None
        part.close()
        with self._changed:
            self._why, self._safe, self._amiss = error.strerror or str(error), 0, False
            if vanished:
                self._salvaged, self._gone = (0, safe) if content is None else (safe, 0)
            if self._rescue:
                name = f"{self.path.stem}-{secrets.token_hex(3)}.log"
                self._part = PartFile(self._rescue / self.path.parent.name / name, content or self._header)
        self._failed()
