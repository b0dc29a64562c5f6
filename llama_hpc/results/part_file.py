"""A file that only grows, on a file system that may fail, be away for a while, or lose it."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

_LOG = logging.getLogger(__name__)


class PartFile:
    """The file ``path``, made with its folder by ``open``; it begins with ``header``. ``lock(descriptor)`` is called for it.

    What was written before the last ``sync`` is ``safe``, so many bytes; after an error ``go_back`` readies the file for
    everything behind it to be written again. A file that is gone from its place is never made anew without what was safe in it.
    Methods raise OSError.
    """

    def __init__(self, path: Path, header: bytes, lock: Callable[[int], object] = lambda descriptor: None):
        self.path, self.safe = path, 0
        self._header, self._lock, self._file = header, lock, -1
        self._home = _identity(path.parents[1])

    @property
    def is_open(self) -> bool:
        """Whether it was ever made."""
        return self._file >= 0

    def open(self) -> None:
        """Makes it. Raises FileExistsError where there is one."""
        self._take(self._create())
        self.write(self._header)

    def write(self, data: bytes) -> None:
        """Adds to its end."""
        _write_all(self._file, data)

    def sync(self) -> None:
        """Returns when everything is on disk, and in its place: else who looks for it there would not find it."""
        os.fsync(self._file)
        # An error that makes ext4 read-only may cost the last commit of its journal, also one that fsync(2) has called a success
        # (Linux 6.18: one time in fifty). What came before another commit is safe.
        os.utime(self._file)
        os.fsync(self._file)
        # ext4 that has turned read-only calls all that a success.
        if os.fstatvfs(self._file).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not self.in_place():
            raise FileNotFoundError(errno.ENOENT, "the file has vanished")
        self.safe = os.fstat(self._file).st_size

    def in_place(self) -> bool:
        """Whether ``path`` still leads to this file."""
        return _identity(self.path) == _identity(self._file) is not None

    def go_back(self) -> None:
        """To the end of what is safe. A file system that was away wants the file to be opened anew."""
        if not self.is_open:
            return
        try:
            again = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._make_anew()
        else:
            if not self._is_mine(again):
                os.close(again)
                raise OSError(errno.ESTALE, "another file is in its place")
            self._take(again)
        os.ftruncate(self._file, self.safe)
        os.lseek(self._file, self.safe, os.SEEK_SET)
        if not self.safe:
            self.write(self._header)

    def salvage(self) -> bytes | None:
        """What was safe, from the open file, wherever that is; None where it cannot be had any more."""
        with contextlib.suppress(OSError):
            found = b""
            while len(found) < self.safe and (piece := os.pread(self._file, self.safe - len(found), len(found))):
                found += piece
            return found if len(found) == self.safe else None
        return None

    def close(self) -> None:
        """Harmless when repeated."""
        if self.is_open:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _is_mine(self, descriptor: int) -> bool:
        """Whether an open file has what was safe, as far as can be told at once."""
        with contextlib.suppress(OSError):
            whole = os.fstat(descriptor).st_size >= self.safe
            return whole and (not self.safe or os.pread(descriptor, len(self._header), 0) == self._header)
        return False

    def _create(self) -> int:
        if _identity(self.path.parents[1]) != self._home:
            raise FileNotFoundError(errno.ENOENT, f"{self.path.parents[1]} is not the folder that it was")
        self.path.parent.mkdir(exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _make_anew(self) -> None:
        """In the place from which it has vanished, with all that was safe."""
        content = self.salvage()
        if content is None:
            raise FileNotFoundError(errno.ENOENT, "the file has vanished with what was in it")
        descriptor = self._create()
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        except OSError:
            os.unlink(self.path)
            os.close(descriptor)
            raise
        self._take(descriptor)
        _LOG.warning("%s had vanished: made anew with all that was in it", self.path)

    def _take(self, descriptor: int) -> None:
        """From now on this is the file."""
        self.close()
        self._file = descriptor
        self._lock(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _identity(where: Path | int) -> tuple[int, int] | None:
    """What tells a file from all others; None where there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(where)
        return found.st_dev, found.st_ino
    return None
