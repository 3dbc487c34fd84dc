"""Shedding: an overloaded server takes fewer requests, so that those that it takes are answered soon."""

import contextlib
import math
from collections.abc import Callable, Iterator
from time import monotonic

WINDOW = 0.05  # seconds that are looked at together, or _SPAN times those that a request may take
_SPAN = 2
LEAST = 8  # requests that are never too many; more where more batches run at a time
_ANSWERS, _LONGEST = 16, 1.0  # or longer, until there are as many, or it is as long
_PAUSE = 0.1  # share of a window in which there was nothing to do, from which on it is a pause
_LITTLE = 3  # times as many as there are, are room enough
_SMOOTHING = 0.3


class Shedding:
    """How many requests may be under way.

    A queue that stands answers no more requests, and each of them later; one that empties has taken a burst. So there is
    room for `most` until, in a window without a pause, requests took longer than they may. Then there is room for as
    many as are answered in the time that they may take, until there is a pause, or a third of that room is enough. Times are
    measured as Little's law has it: requests under way are answers a second times the seconds that each takes.

    Source: "Controlling Queue Delay" (Nichols and Jacobson, ACM Queue 10, 2012), and for servers "Fail at Scale"
    (Maurer, ACM Queue 13, 2015); refused at the door here, where it is cheap.

    Args:
      seconds: that requests may take at the moment, from their headers to their answers.
      most: requests that there is room for.
      least: requests that are never too many.
    """

    def __init__(self, seconds: Callable[[], float], most: int, least: int = LEAST):
        self._seconds, self._most, self._least = seconds, most, min(least, most)
        #: Requests that may be under way.
        self.limit: int = most
        #: Requests that wait for others or for a batch, or are in one.
        self.under_way: int = 0
        self._begin = self._at = monotonic()
        #: Of this window: seconds that all requests took together, those without any, and good answers.
        self._taken, self._pauses, self._answers = 0.0, 0.0, 0
        self._rate: float | None = None  # answers a second

    def full(self, ready: int) -> bool:
        """Whether there is no room for one more.

        Args:
          ready: of those under way, the ones that only need to be told their answers.
        """
        return self.under_way - ready >= self.limit

    def begin(self) -> None:
        """One more is under way."""
        now = self._pass()
        length = now - self._begin
        if not self.under_way and length >= WINDOW and self._pauses > _PAUSE * length:
            self._look(now)
        self.under_way += 1

    def end(self, answered: bool) -> None:
        """One is no longer: it was answered, or was refused or left."""
        now = self._pass()
        self.under_way -= 1
        self._answers += answered
        length = now - self._begin
        if length < WINDOW or (self._answers < _ANSWERS and length < _LONGEST):
            return
        if length >= _SPAN * self._seconds():  # answers come a batch at a time
            self._look(now)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what a request waits for that keeps no other from being answered, such as its own body."""
        self._pass()
        self.under_way -= 1
        try:
            yield
        finally:
            self.begin()

    def _pass(self) -> float:
        now = monotonic()
        if self.under_way:
            self._taken += (now - self._at) * self.under_way
        else:
            self._pauses += now - self._at
        self._at = now
        return now

    def _look(self, now: float) -> None:
        length = now - self._begin
        if self._pauses > _PAUSE * length:
            self.limit, self._rate = self._most, None
        elif self._answers:
            rate = self._answers / (length - self._pauses)
            self._rate = rate if self._rate is None else self._rate + _SMOOTHING * (rate - self._rate)
            seconds = self._seconds()
            fitting = min(max(math.ceil(self._rate * seconds), self._least), self._most)
            if self._taken > seconds * self._answers and self._taken > self._least * length:
                self.limit = fitting
            elif _LITTLE * self._taken < self.limit * length:
                self.limit = self._most
            else:
                self.limit = max(self.limit, fitting)
        self._begin, self._taken, self._pauses, self._answers = now, 0.0, 0.0, 0
