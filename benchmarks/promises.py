"""Promises: which were met, and whether a benchmark of them failed."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Promise:
    """What came of one.

    Attributes:
      text: what was measured, and what was wanted.
      met: whether it was.
      always: whether it must be at any speed of the machine.
    """

    text: str
    met: bool
    always: bool = False


def judge(promises: Sequence[Promise]) -> int:
    """Prints which are met; 1 if one is missed that always must be, else 0."""
    for promise in promises:
        print(f"{'met' if promise.met else 'MISSED'}: {promise.text}")
    return int(any(promise.always and not promise.met for promise in promises))
