"""What the processes of one job tell each other."""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def from_first_process(value: Any) -> Any:
    """What process 0 passes, JSON-able, on all processes of the job; all of them call this."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    first = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(np.asarray(first).tobytes())


def largest(value: int | None) -> int | None:
    """The largest int32 that a process of the job passes, None where none passes any; all of them call this."""
    if jax.process_count() == 1:
        return value
    found = int(np.max(multihost_utils.process_allgather(np.int32(-1 if value is None else value))))
    return None if found < 0 else found


def processes_where(condition: bool) -> list[int]:
    """The processes that pass True; all of them call this."""
    if jax.process_count() == 1:
        return [0] if condition else []
    return np.flatnonzero(multihost_utils.process_allgather(np.int32(condition))).tolist()


def on_all(make: Callable[[], T], what: str) -> T:
    """What `make` gives, once it has given something on all processes of the job; all of them call this.

    Args:
      make: called here.
      what: it does, for the error.

    Raises:
      Exception: what `make` raised on this process.
      ValueError: if it raised on others alone, which would else be waited for.
    """
    result, error = None, None
    try:
        result = make()
    except Exception as e:
        error = e
    failed = processes_where(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"processes {failed} cannot {what}; their errors say why.")
    return cast(T, result)
