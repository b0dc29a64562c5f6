"""Log lines: who speaks, and what a line looks like."""

import io
import json
import logging
import re
import sys
import warnings
from datetime import datetime

import pytest

from llama_hpc.errors import UsageError
from llama_hpc.runtime import log
from llama_hpc.runtime.progress import Progress


@pytest.fixture(autouse=True)
def restored_logger():
    logger = logging.getLogger("llama_hpc")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_first_rank_shows_information_with_elapsed_time(capsys):
    log.setup(0)
    logging.getLogger("llama_hpc.engine.loop").info("model loaded, %d layers", 30)
    assert re.fullmatch(r"\[ +0\.\d\d s\] model loaded, 30 layers\n", capsys.readouterr().err)


def test_other_ranks_show_warnings_only_with_their_rank(capsys):
    logger = log.setup(3)
    logger.info("model loaded")
    logger.warning("memory is short")
    assert re.fullmatch(r"\[ +0\.\d\d s\] rank 3: warning: memory is short\n", capsys.readouterr().err)


def test_set_up_twice_does_not_double_the_lines(capsys):
    log.setup(0)
    log.setup(0).info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.fixture
def warnings_logger():
    yield
    logging.captureWarnings(False)
    logging.getLogger("py.warnings").handlers = []


def test_every_rank_has_a_file_with_all_that_it_says(capsys, tmp_path, warnings_logger):
    """Also what no terminal shows; a second run goes on behind the first."""
    for message in ("first run", "second run"):
        logger = log.setup(3, str(tmp_path / "new" / "logs"))
        logger.info("the %s", message)
        logger.debug("details")
        logger.warning("memory is short")
    lines = (tmp_path / "new" / "logs" / "rank-0003.log").read_text().splitlines()
    assert [re.sub(r"\[ *\d+\.\d\d s\] ", "", line) for line in lines] == [
        line for run in ("first", "second") for line in (f"rank 3: the {run} run", "rank 3: details",
                                                         "rank 3: warning: memory is short")]
    assert capsys.readouterr().err.count("\n") == 2, "the terminal has the warnings of ranks that are not the first"


def test_json_lines_of_the_terminal(capsys):
    log.setup(0, as_json=True).info("model loaded, %d layers", 30)
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["message"] == "model loaded, 30 layers" and (record["rank"], record["level"]) == (0, "INFO")
    assert record["logger"] == "llama_hpc" and record["host"] and 0 <= record["seconds"] < 60
    assert datetime.fromisoformat(record["time"]).tzinfo is not None


def test_json_lines_of_files_leave_the_terminal_as_it_is(capsys, tmp_path, warnings_logger):
    """Errors come with their traceback, and Python's own warnings are there too."""
    log.setup(0, str(tmp_path), as_json=True).info("hello")
    warnings.warn("something is old", DeprecationWarning, stacklevel=1)
    try:
        raise ValueError("an odd value")
    except ValueError as error:
        log.keep_failure(error)
    records = [json.loads(line) for line in (tmp_path / "rank-0000.jsonl").read_text().splitlines()]
    assert [record["level"] for record in records] == ["INFO", "WARNING", "ERROR"]
    assert "something is old" in records[1]["message"]
    assert records[2]["message"] == "an odd value" and "Traceback" in records[2]["exception"]
    said = capsys.readouterr().err
    assert said.startswith("[") and "hello" in said and "Traceback" not in said


def test_a_file_that_cannot_be_made_is_an_error_of_usage(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--log-dir .*/file: cannot write .*rank-0002\.log: .*: give a folder in which"):
        log.setup(2, str(tmp_path / "file"))


def test_a_file_that_fails_later_is_given_up_with_one_line(capsys):
    """/dev/full: no space left."""
    logger = log.setup(0)
    logger.addHandler(log._RankFile("/dev/full"))
    for _ in range(3):
        logger.warning("a line")
    said = capsys.readouterr().err
    assert said.count("a line") == 3 and said.count("cannot write /dev/full any more: ") == 1 and "Traceback" not in said


def test_a_rank_that_becomes_the_first_one_speaks(capsys):
    logger = log.setup(2)
    logger.info("silent")
    log.become_first()
    logger.info("heard")
    assert re.fullmatch(r"\[ +0\.\d\d s\] rank 2: heard\n", capsys.readouterr().err)


def test_lines_make_room_for_a_progress_bar(monkeypatch):
    """On a terminal: the bar is taken away, the line written, and the bar drawn again."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = log.setup(0)
    with Progress(10, "prompts", "answering"):
        logger.info("a line")
    drawn = terminal.getvalue()
    line = next(part for part in re.split(r"[\r\n]", drawn) if "a line" in part)
    assert re.fullmatch(r"(\x1b\[A)?\[ +0\.\d\d s\] a line", line) and drawn.index("a line") < drawn.rindex("answering")
