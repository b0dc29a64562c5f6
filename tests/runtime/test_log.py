"""Log lines: who speaks, and what a line looks like."""

import logging
import re

import pytest

from llama_hpc.runtime import log


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
