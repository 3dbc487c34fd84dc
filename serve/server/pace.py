"""Pace: what loads a version runs in short steps, so that the threads that serve hardly wait for the interpreter."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Pace:
    """While it is entered, this thread stops after `step` seconds of Python for `rest` times as long, if `busy()`.

    A thread that computes holds the interpreter until another has asked for it for a while, and then again a
    moment later. Most of what loads a version is in other libraries (tracing of a new model takes seconds), where
    there is no other place to stop at than calls: this is a profile function of the thread (`sys.setprofile`).

    Args:
      busy: whether others need the interpreter; asked after each step.
      step: seconds.
      rest: seconds of sleep for each second of work.
      longest: seconds of sleep at once; what takes long in one call, such as a compiler, does without the interpreter.
    """

    def __init__(
        self, busy: Callable[[], bool], step: float = 0.0002, rest: float = 9.0, longest: float = 0.05
    ):
        self._busy, self._step, self._rest, self._longest = busy, step, rest, longest
        self._asked = self._worked = 0.0

    def __enter__(self) -> Self:
        self._asked, self._worked = time.perf_counter(), time.thread_time()
        sys.setprofile(self._profile)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        # Waiting for a disk is no work; but the time of a thread costs more to ask for.
        if time.perf_counter() - self._asked < self._step:
            return
        worked = time.thread_time() - self._worked
        if worked >= self._step:
            if self._busy():
                time.sleep(min(worked * self._rest, self._longest))
            self._worked = time.thread_time()
        self._asked = time.perf_counter()
