"""What the processes of one job tell each other."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_first_process(value: Any) -> Any:
    """What process 0 passes, JSON-able, on all processes of the job; all of them call this."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    first = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(np.asarray(first).tobytes())


def processes_where(condition: bool) -> list[int]:
    """The processes that pass True; all of them call this."""
    if jax.process_count() == 1:
        return [0] if condition else []
    return np.flatnonzero(multihost_utils.process_allgather(np.int32(condition))).tolist()
