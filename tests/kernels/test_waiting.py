"""Waits for other processes end when an alarm rings; without a reason to ring they go on."""

import threading
import time

import pytest

from llama_hpc.kernels.cpu.joining import meet
from llama_hpc.kernels.cpu.memory import address, aligned
from llama_hpc.kernels.cpu.waiting import Alarm, advance, wait_unless


@pytest.fixture
def word():
    """The address of a word that somebody waits for, and of who sleeps on it behind it."""
    array = aligned(16, "i8", 0)
    yield address(array)


def test_a_wait_looks_for_a_reason_to_end(word):
    looks = []
    alarm = Alarm(lambda: looks.append(1) or len(looks) == 3, milliseconds=1)
    assert wait_unless(word, 0, 10, alarm.address) and alarm.rings and len(looks) == 3


def test_once_it_rings_waits_end_at_once(word):
    alarm = Alarm(lambda: True, milliseconds=1)
    assert alarm.look()
    start = time.monotonic()
    assert meet(word, 2, 10, alarm.address) and time.monotonic() - start < 1


def test_what_comes_in_time_is_no_reason(word):
    alarm = Alarm(lambda: False, milliseconds=1)
    # The other thread can run only if the wait lets Python go on, as looking does.
    waker = threading.Timer(0.05, advance, [word])
    waker.start()
    assert not wait_unless(word, 0, 10, alarm.address)
    waker.join()
    assert not alarm.rings


def test_without_an_alarm_the_last_one_to_come_goes_on(word):
    assert not meet(word, 1, 10, 0)
