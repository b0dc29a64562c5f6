"""The file of finished answers on file systems that fail: for a while, for good, full, read-only, gone with what they held."""

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from llama_hpc.errors import ResultsError
from llama_hpc.results import part_file, patience
from llama_hpc.results.part_writer import PartWriter
from llama_hpc.results.parts import try_lock
from llama_hpc.results.records import framed, read_records


def record(number):
    return framed({"request": number})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses are short, and so is the patience."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "PATIENCE", 0.3)


@pytest.fixture
def part(tmp_path):
    """Where a part is to be: the folder in which its own is made."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out.h5.progress" / "part-0-0.log"


@pytest.fixture
def rescue(tmp_path):
    (tmp_path / "rescue").mkdir()
    return tmp_path / "rescue"


class Failing:
    """Stands for a file system: writing and syncing fail while it is ``broken``, below the ``folder`` that a test may name."""

    def __init__(self, monkeypatch, number=errno.ENOSPC, folder=Path("/")):
        self.broken, self.error, self.folder = False, OSError(number, os.strerror(number)), folder
        self.write, self.fsync = os.write, os.fsync
        monkeypatch.setattr(part_file.os, "write", self._write)
        monkeypatch.setattr(part_file.os, "fsync", self._fsync)

    def _fails(self, file):
        return self.broken and Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(self.folder)

    def _write(self, file, data):
        if self._fails(file):
            # Half of it arrives.
            self.write(file, bytes(data[: len(data) // 2]))
            raise self.error
        return self.write(file, data)

    def _fsync(self, file):
        if self._fails(file):
            raise self.error
        self.fsync(file)


def requests_in(path: Path) -> list[int]:
    return [payload[0]["request"] for payload in read_records(path).payloads[1:]]


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def rescued(rescue: Path, part: Path) -> list[int]:
    (path,) = (rescue / part.parent.name).iterdir()
    assert path.name.startswith(part.stem + "-")
    return requests_in(path)


def test_there_is_no_file_before_the_first_answer(part):
    writer = PartWriter(part, framed({}), interval=100)
    time.sleep(0.1)
    assert not part.parent.exists()
    writer.close()
    assert not part.parent.exists()


def test_what_is_handed_over_is_in_the_file_at_once(part):
    writer = PartWriter(part, framed({}), interval=100)
    writer.append(record(4))
    writer.settle()
    assert requests_in(part) == [4]
    writer.close()


def test_an_answer_is_not_safe_by_the_last_sync_that_has_worked(part, rescue, monkeypatch):
    """An error of the file system may undo that."""
    disk = Failing(monkeypatch, errno.EROFS, part.parents[1])

    def last(file):
        disk.fsync(file)
        disk.broken = True
        monkeypatch.setattr(part_file.os, "fsync", disk._fsync)
    monkeypatch.setattr(part_file.os, "fsync", last)
    writer = PartWriter(part, framed({}), interval=0, rescue=rescue)
    writer.append(record(7))
    until(lambda: disk.broken)
    with pytest.raises(ResultsError, match="1 finished answers are in"):
        writer.close()
    assert rescued(rescue, part) == [7]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_file_system_that_recovers_loses_nothing(part, monkeypatch, caplog, number):
    monkeypatch.setattr(patience, "PATIENCE", 10)
    disk = Failing(monkeypatch, number)
    writer = PartWriter(part, framed({}), interval=0.05, lock=try_lock)
    for request in range(40):
        disk.broken = 5 <= request < 8 or 20 <= request < 30
        writer.append(record(request))
        time.sleep(0.01)
    disk.broken = False
    writer.close()
    assert writer.retries > 0 and requests_in(part) == list(range(40))
    assert f"cannot write {part}: {os.strerror(number)}: trying again in 0.0 s" in caplog.text and "works again" in caplog.text


@pytest.mark.parametrize("safe", [0, 2])
def test_a_file_system_that_stays_away_stops_the_run_with_all_answers_rescued(part, rescue, monkeypatch, safe):
    disk, told = Failing(monkeypatch, folder=part.parent), []
    writer = PartWriter(part, framed({}), interval=0.02, rescue=rescue, failed=lambda: told.append(1))
    for number in range(safe):
        writer.append(record(number))
    until(lambda: not writer._kept)
    disk.broken = True
    writer.append(record(7))
    until(lambda: told)
    # Of the same step: this one too.
    writer.append(record(8))
    said = (rf"cannot write {part}: No space left on device, tried \d+ times; 2 finished answers are in {rescue}/out.h5.progress/"
            rf"part-0-0-[0-9a-f]+.log: make room or mend the file system, then run again with --resume --rescue {rescue}")
    with pytest.raises(ResultsError, match=said):
        writer.settle()
    with pytest.raises(ResultsError, match=said):
        writer.close()
    assert rescued(rescue, part) == [7, 8] and told == [1]
    assert not safe or requests_in(part) == list(range(safe))


def test_without_a_second_place_the_line_says_what_will_be_computed_again(part, monkeypatch):
    disk, told = Failing(monkeypatch, errno.EIO), []
    writer = PartWriter(part, framed({}), interval=0.02, failed=lambda: told.append(1))
    writer.append(record(1))
    until(lambda: not writer._kept)
    disk.broken = True
    writer.append(record(2))
    until(lambda: told)
    with pytest.raises(ResultsError, match=r"Input/output error, tried \d+ times; 1 finished answers that were not yet on disk "
                                           r"will be computed again: make room or mend .*, then run again with --resume$"):
        writer.close()
    assert requests_in(part) == [1]


def test_a_second_place_that_fails_too(part, rescue, monkeypatch):
    disk = Failing(monkeypatch)
    disk.broken = True
    writer = PartWriter(part, framed({}), interval=0.02, rescue=rescue)
    writer.append(record(1))
    with pytest.raises(ResultsError, match=f"; 1 finished answers are lost, as {rescue} failed too: No space left on device"):
        writer.close()


def test_a_part_is_never_written_over(part):
    part.parent.mkdir()
    part.write_bytes(b"x")
    writer = PartWriter(part, framed({}), 1)
    writer.append(record(1))
    with pytest.raises(ResultsError, match="File exists"):
        writer.close()
    assert part.read_bytes() == b"x"


def test_a_folder_that_is_removed_comes_back_with_everything(part, caplog):
    writer = PartWriter(part, framed({}), interval=0.02)
    for number in range(3):
        writer.append(record(number))
    until(lambda: not writer._kept)
    shutil.rmtree(part.parent)
    writer.append(record(3))
    until(part.exists)
    writer.append(record(4))
    writer.close()
    assert requests_in(part) == [0, 1, 2, 3, 4]
    assert f"{part} had vanished: made anew with all that was in it" in caplog.text


def test_a_part_that_another_file_has_replaced_is_left_alone(part, rescue):
    writer = PartWriter(part, framed({"mine": 1}), interval=0.02, rescue=rescue)
    writer.append(record(0))
    until(lambda: not writer._kept)
    part.unlink()
    part.write_bytes(b"somebody else's" * 10)
    writer.append(record(1))
    with pytest.raises(ResultsError, match=r"another file is in its place, tried .*; 2 finished answers are in "):
        writer.close()
    assert rescued(rescue, part) == [0, 1] and part.read_bytes().startswith(b"somebody")


def test_when_the_outputs_folder_vanishes_all_that_can_be_had_is_rescued(part, rescue):
    """Not made anew there: what is under that name now is another folder, perhaps another disk."""
    writer = PartWriter(part, framed({}), interval=0.02, rescue=rescue)
    writer.append(record(0))
    until(lambda: not writer._kept)
    shutil.rmtree(part.parents[1])
    part.parents[1].mkdir()
    writer.append(record(1))
    with pytest.raises(ResultsError, match=r"is not the folder that it was, tried .*; 2 finished answers are in "):
        writer.close()
    assert rescued(rescue, part) == [0, 1] and list(part.parents[1].iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB of its own; a function that mounts it anew with other options."""
    folder = tmp_path / "results"
    folder.mkdir()
    def mount(*options):
        return subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0
    if os.getuid() or not mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        pytest.skip("this user cannot mount file systems")
    yield folder, lambda option: mount("-o", f"remount,{option}", str(folder))
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def test_a_full_disk_is_waited_for_until_there_is_room(small_disk, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 10)
    folder, _ = small_disk
    (folder / "filler").write_bytes(bytes(48 << 10))
    writer = PartWriter(folder / "out.h5.progress/part-0-0.log", framed({}), interval=0.02)
    for number in range(4):
        writer.append(framed({"request": number}, bytes(8 << 10)))
    until(lambda: writer.retries)
    (folder / "filler").unlink()
    writer.close()
    assert requests_in(writer.path) == [0, 1, 2, 3]


def test_a_disk_that_stays_full_is_left_with_what_it_holds(small_disk, rescue):
    folder, _ = small_disk
    writer = PartWriter(folder / "out.h5.progress/part-0-0.log", framed({}), interval=0.02, rescue=rescue)
    for number in range(9):
        writer.append(framed({"request": number}, bytes(16 << 10)))
        time.sleep(0.05)
    with pytest.raises(ResultsError, match="No space left on device"):
        writer.close()
    kept = [payload[0]["request"] for payload in read_records(writer.path).payloads[1:]]
    assert kept and sorted({*kept, *rescued(rescue, writer.path)}) == list(range(9))


def test_a_disk_that_becomes_read_only_for_a_while(small_disk, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 10)
    folder, remount = small_disk
    # The folder alone, beside an open file, would be refused as busy: so it is for the file system.
    writer = PartWriter(folder / "out.h5.progress/part-0-0.log", framed({}), interval=0.02)
    if not remount("ro"):
        pytest.skip("this file system cannot be made read-only")
    writer.append(record(0))
    until(lambda: writer.retries)
    assert remount("rw")
    writer.append(record(1))
    writer.close()
    assert requests_in(writer.path) == [0, 1]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_file_system_that_is_unmounted_in_mid_run(small_disk, rescue, monkeypatch, comes_back):
    """Lazily, as a file is open: writing to it goes on without an error, but nobody would find it."""
    folder, _ = small_disk
    monkeypatch.setattr(patience, "PATIENCE", 10 if comes_back else 0.3)
    writer = PartWriter(folder / "out.h5.progress/part-0-0.log", framed({}), interval=0.02, rescue=rescue)
    writer.append(record(0))
    until(lambda: not writer._kept)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", str(folder), str(elsewhere)], check=True)
    try:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        writer.append(record(1))
        until(lambda: writer.retries)
        if comes_back:
            subprocess.run(["mount", "--bind", str(elsewhere), str(folder)], check=True)
            writer.close()
            assert requests_in(writer.path) == [0, 1]
        else:
            with pytest.raises(ResultsError, match="2 finished answers are in"):
                writer.close()
            assert rescued(rescue, writer.path) == [0, 1] and list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(elsewhere)], check=True)
