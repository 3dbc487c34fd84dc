"""Pace: what runs in it stops after each step while others are busy, and is otherwise as it was."""

import sys
import threading
import time

import pytest

from jaxembed.serve.server import pace
from jaxembed.serve.server.pace import Pace


def work(seconds):
    """Python that takes so long."""

    def step(number):
        return number + 1

    number, end = 0, time.thread_time() + seconds
    while time.thread_time() < end:
        number = step(number)
    return number


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(pace.time, "sleep", seconds.append)
    return seconds


def test_rests_between_steps_while_others_are_busy(slept):
    with Pace(lambda: True, step=0.001, rest=4.0, longest=0.01):
        assert work(0.1) > 0
    assert sys.getprofile() is None
    # Of a hundred; on a machine that is busy itself, some are longer.
    assert len(slept) > 10
    assert all(0.004 <= seconds <= 0.01 for seconds in slept)


def test_does_not_rest_otherwise(slept):
    asked = []
    with Pace(lambda: bool(asked.append(0)), step=0.001):
        work(0.02)
    assert asked
    assert not slept


def test_other_threads_are_left_alone(slept):
    with Pace(lambda: True, step=0.001):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(sys.getprofile()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_errors_end_it(slept):
    with pytest.raises(ZeroDivisionError), Pace(lambda: True):
        _ = 1 / 0
    assert sys.getprofile() is None
