"""Progress of a job, beside its output: the folder ``OUTPUT.progress`` with a file of finished answers for each replica and run.

``part-A-R.log`` is what replica R of run A has finished (``records``), from run 0 on; its first record says which job it is, and
tells of the run. ``job.json`` says the same before there is a part. Who writes holds a lock by flock(2), which ends with the
process: on ``lock`` the job as a whole, on each part its replica. The folder is removed when the output is complete, or a run
fails before anything is finished. A folder of the same name in another one, for rescue, may have more parts.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results.locks import LOOK, LockedFolder, try_lock
from llama_hpc.results.patience import patiently
from llama_hpc.results.records import first_record, output_of, read_records
from llama_hpc.results.schema import Output, canonical_logprobs, canonical_tokens

_LOG = logging.getLogger(__name__)
FORMAT, VERSION = "llama_hpc progress", 1
_PART = re.compile(r"part-(\d+)-(\d+)(-[0-9a-f]+)?\.log")
_ORPHANS = 60.0                 # seconds to wait for ranks of a killed run that still write
_BESIDE = ("job.json", "counters", "lock")      # what lies beside the parts


@dataclass
class Found:
    """What earlier runs have finished: which job it is of, answers, facts about each run, bytes of records that were cut off."""

    identity: dict[str, Any] | None = None
    outputs: list[Output] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0


class ProgressFolder(LockedFolder):
    """The progress of the job that writes ``output``. Not collective: the first rank locks and reads, leaders write parts."""

    def __init__(self, output: str | Path):
        output = Path(os.path.realpath(output))
        super().__init__(output, output.with_name(output.name + ".progress"))
        self._rescued: list[Path] = []      # parts elsewhere that were read

    @property
    def parts(self) -> list[Path]:
        """Files of finished answers, by run and replica."""
        return _parts_in(self.path)

    @property
    def next_run(self) -> int:
        """The number of a run that begins now. Raises ResultsError."""
        before = self._noted()
        runs = [_run_of(path) for path in self.parts] + ([before["run"]] if before else [])
        return 1 + max(runs, default=-1)

    def part(self, run: int, replica: int) -> Path:
        """The file of one replica of a run."""
        return self.path / f"part-{run}-{replica}.log"

    def try_to_write(self) -> None:
        """Raises ResultsError where this process cannot make files in the folder."""
        path = self.path / f".{socket.gethostname()}-{os.getpid()}"
        try:
            path.touch(exist_ok=False)
            path.unlink()
        except OSError as error:
            raise ResultsError(f"cannot write to {self.path}: {error.strerror}: all nodes must be able to write to that folder"
                               ) from None

    def identity(self) -> dict[str, Any] | None:
        """Which job this is the progress of; None where there is none. Raises ResultsError for what cannot be read."""
        for path in self.parts:
            if identity := self._identity_of(path):
                return identity
        noted = self._noted()
        return noted and noted["identity"]

    def _identity_of(self, path: Path) -> dict[str, Any] | None:
        """The job of a part; None where not even that was written. Raises ResultsError."""
        facts = first_record(path)
        if facts is None:
            return None
        self._check_version(path, facts.get("version", 0))
        return facts.get("identity", {})

    def _noted(self) -> dict[str, Any] | None:
        """What ``job.json`` says: the job's identity, and the last run. Raises ResultsError."""
        path = self.path / "job.json"
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            noted["run"], noted["identity"], version = int(noted["run"]), dict(noted["identity"]), int(noted["version"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"cannot read {path} ({error}): restore it, or remove it if there are parts beside it") from None
        self._check_version(path, version)
        return noted

    @staticmethod
    def _check_version(path: Path, version: int) -> None:
        if version > VERSION:
            raise ResultsError(f"{path} is of version {version}, this program knows version {VERSION}: use a newer one")

    def identify(self, identity: dict[str, Any], run: int) -> None:
        """Notes which job and which run of it this is, whole or not at all. Raises ResultsError."""
        temporary = self.path / "job.json.tmp"
        def note() -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "version": VERSION, "identity": identity, "run": run}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / "job.json")
        try:
            patiently(note, f"cannot keep progress in {self.path}")
        except OSError as error:
            raise ResultsError(f"cannot keep progress in {self.path}: {error.strerror}") from None

    def wait_for_writers(self, patience: float = _ORPHANS) -> None:
        """Waits for ranks of a killed run that still write. Raises ResultsError where one does for too long."""
        end, told = time.monotonic() + patience, False
        for path in self.parts:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while not try_lock(descriptor, fcntl.LOCK_SH):
                    if time.monotonic() > end:
                        raise ResultsError(f"a rank of an earlier run still writes {path} after {patience:.0f} s "
                                           f"({_writer(path)}): end that process")
                    if not told:
                        _LOG.info("waiting for a rank of an earlier run that still writes %s (%s)", path, _writer(path))
                        told = True
                    time.sleep(LOOK)
            finally:
                os.close(descriptor)

    def is_empty(self) -> bool:
        """Whether there is no answer in any part, and nobody who might add one. Raises ResultsError for damaged files."""
        for path in self.parts:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not try_lock(descriptor, fcntl.LOCK_SH) or len(read_records(path).payloads) > 1:
                    return False
            finally:
                os.close(descriptor)
        return True

    def read(self, identity: dict[str, Any], rescue: Path | None = None, known: Found | None = None) -> Found:
        """Everything that the job of this identity has finished, each answer once. ``rescue``: another folder with parts;
        ``known``: what was read before, should it be there no more.

        Raises ResultsError for damaged files, for parts of another job, and for answers that differ, which a job cannot give.
        """
        found, seen, runs = Found(), {}, {}
        if known:
            found.identity = known.identity
            seen = {(output.request, output.sample): output for output in known.outputs}
            runs = {run["run"]: run for run in known.runs}
        for path in [*self.parts, *(self._parts_in_rescue(rescue, identity) if rescue else ())]:
            run, records = _run_of(path), read_records(path)
            found.torn += records.torn
            if not records.payloads:
                continue
            facts = records.payloads[0][0]
            own = facts.pop("identity", {})
            found.identity = found.identity or own
            if different := differences(own, found.identity | identity):
                raise ResultsError(f"{path} is of another job ({'; '.join(different)}): move it away")
            runs.setdefault(run, {"run": run, **facts})
            for payload in records.payloads[1:]:
                output = output_of(payload, run)
                before = seen.setdefault((output.request, output.sample), output)
                if before is not output and _bits(before) != _bits(output):
                    raise ResultsError(f"{self.path} has two different answers to request {output.request} (sample "
                                       f"{output.sample}), of runs {before.attempt} and {run}: move it away and begin anew")
        answers = Counter(output.attempt for output in seen.values())
        found.runs = [runs[run] | {"answers": answers[run]} for run in sorted(runs)]
        found.outputs = list(seen.values())
        return found

    def _parts_in_rescue(self, rescue: Path, identity: dict[str, Any]) -> list[Path]:
        """Those of the job of this identity: other jobs may have brought answers there too. Raises ResultsError."""
        self._rescued = []
        for path in _parts_in(rescue / self.path.name):
            if differences(self._identity_of(path) or {}, identity):
                _LOG.warning("%s is of another job: left alone", path)
            else:
                self._rescued.append(path)
        return self._rescued

    def remove(self) -> None:
        """All of it, if the lock is held, and what was read elsewhere: nothing of it is needed any more."""
        if self.locked:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path)
            with contextlib.suppress(OSError):
                for path in self._rescued:
                    path.unlink()
                for folder in {path.parent for path in self._rescued}:
                    folder.rmdir()
            self.release()

    def discard(self) -> None:
        """What is there of a job of this process that has finished nothing. Others may still be about to."""
        if not self.parts:
            with contextlib.suppress(OSError):
                for name in _BESIDE:
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()
        self.release()

    def clear(self) -> None:
        """Forgets what earlier runs have done; the lock stays."""
        for path in [*self.parts, self.path / "job.json", *self.path.glob("hang-*.txt")]:
            path.unlink(missing_ok=True)


def _parts_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _PART.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: [*map(int, _PART.fullmatch(path.name).groups()[:2]), path.name])


def _run_of(path: Path) -> int:
    return int(_PART.fullmatch(path.name)[1])


def check_same_job(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UsageError where what is there of ``output`` is of another job, and says what differs; facts that only one of both
    has are not compared."""
    if different := differences(before, now):
        raise UsageError(f"cannot resume {output}: {'; '.join(different)}: give what the job began with, or --overwrite in place "
                         "of --resume to begin anew")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two jobs differ, in words, of the facts that are known of both."""
    return [f"{name} was {before[name]}, now {value}" for name, value in now.items() if before.get(name, value) != value]


def _bits(output: Output) -> tuple[bytes, bytes]:
    return canonical_tokens(output.tokens).tobytes(), canonical_logprobs(output.logprobs).tobytes()


def _writer(path: Path) -> str:
    """The process that a part's first record names."""
    with contextlib.suppress(ResultsError):
        records = read_records(path)
        if records.payloads:
            facts = records.payloads[0][0]
            return f"process {facts.get('pid')} on {facts.get('host')}"
    return "unknown process"
