"""Ranks ask each other where they stand, without MPI: through files in a folder that they share.

A rank asks by a file ``.hang-call-RANK``; every rank that sees it writes ``hang-RANK.txt``, where it is in one line of JSON, and
behind it the stacks of its threads. The files bear the mark of their job: others, of a run before, are not looked at.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

_CALL = re.compile(r"\.hang-call-(\d+)")
Call = tuple[int, int]          # who asks, for the how manieth time


class RollCall:
    """One rank's part. Methods raise OSError where the folder cannot be used."""

    def __init__(self, folder: Path, mark: str, rank: int):
        self.folder, self._mark, self._rank = folder, mark, rank
        self._number = 0

    def ask(self) -> Call:
        """Asks all."""
        self._number += 1
        self._put(f".hang-call-{self._rank}", json.dumps({"job": self._mark, "number": self._number}))
        return self._rank, self._number

    def withdraw(self) -> None:
        """Nobody need answer this rank any more."""
        with contextlib.suppress(OSError):
            (self.folder / f".hang-call-{self._rank}").unlink()

    def calls(self) -> set[Call]:
        """Who asks now."""
        found = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for name in [entry.name for entry in entries if _CALL.fullmatch(entry.name)]:
                if asked := self._read(name):
                    found.add((int(_CALL.fullmatch(name)[1]), asked["number"]))
        return found

    def answer(self, calls: set[Call], state: dict[str, Any], stacks: str) -> None:
        """Answers them all."""
        text = json.dumps({"job": self._mark, "calls": sorted(calls), **state})
        self._put(f"hang-{self._rank}.txt", f"{text}\n\n{stacks}")

    def answers(self, call: Call, ranks: set[int]) -> dict[int, dict[str, Any]]:
        """Those of ``ranks`` that have answered a call, and what."""
        found = {rank: self._read(f"hang-{rank}.txt") for rank in ranks}
        return {rank: state for rank, state in found.items() if state and list(call) in state["calls"]}

    def clear(self) -> None:
        """Takes away what this rank has written, and the folder where nothing else is in it."""
        self.withdraw()
        with contextlib.suppress(OSError):
            (self.folder / f"hang-{self._rank}.txt").unlink(missing_ok=True)
            self.folder.rmdir()

    def _put(self, name: str, text: str) -> None:
        """A file, whole or not at all."""
        temporary = self.folder / f".{name}.tmp"
        for last in (False, False, True):
            try:
                self.folder.mkdir(exist_ok=True)
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self.folder / name)
                return
            except FileNotFoundError:
                # Another rank, which needed the folder no longer, has just removed it.
                if last or not self.folder.parent.is_dir():
                    raise

    def _read(self, name: str) -> dict[str, Any] | None:
        """The first line of a file; None where it is none of this job's."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder / name).read_text(encoding="utf-8").partition("\n")[0])
            return found if found["job"] == self._mark else None
        return None
