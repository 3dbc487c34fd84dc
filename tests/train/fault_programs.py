"""Saves and converts while the disk fails, in a process that tests/faults.c is preloaded into.

Prints a line of JSON a fault: what it was, what the process was told, and what was there afterwards.
"""

import ctypes
import errno
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from jaxembed.checkpoint import convert_to_bundle, whole_steps
from jaxembed.train import Checkpointer
from tests.train.checkpoint_programs import at_step, embedding, feature_config

WRITE, SYNC, NAME, RENAME = 1, 2, 4, 8
# A full disk still renames; a broken one fails at whatever it is asked.
FAULTS = {
    "full": (errno.ENOSPC, WRITE | NAME),
    "broken": (errno.EIO, WRITE | SYNC | NAME | RENAME),
    "unsynced": (errno.EIO, SYNC),
}


def main(what: str, directory: pathlib.Path, fault: str, points: int) -> None:
    """Lets the disk fail at `points` calls, spread over all that a save (or conversion) makes."""
    library, (code, kinds) = ctypes.CDLL(None), FAULTS[fault]
    arm = lambda after, where: library.fault_arm(  # noqa: E731
        ctypes.c_long(after), code, kinds, str(where).encode()
    )
    own = embedding(1)
    attempt = _save if what == "save" else _convert
    arm(10**9, directory / "none")
    attempt(own, directory / "none", lambda: None, lambda: None)
    total = library.fault_count()
    disarm = lambda: library.fault_arm(ctypes.c_long(10**9), 0, 0, b"")  # noqa: E731
    for after in sorted({int(i) for i in np.linspace(0, total - 1, points)}):
        where = directory / str(after)
        error, left = attempt(own, where, lambda after=after, where=where: arm(after, where), disarm)
        early = bool(library.fault_early())
        line = {"after": after, "total": total, "early": early, "error": error, "left": left}
        print(json.dumps(line), flush=True)


def _save(own, where, start, stop) -> tuple[str | None, list[int]]:
    """Step 1, then step 2 on the failing disk, then steps 2 and 3 on one that works again."""
    error = None
    with Checkpointer(where, own) as checkpointer:
        if where.name == "none":
            _save_step(checkpointer, own, 2)
            return None, []
        _save_step(checkpointer, own, 1)
        start()
        try:
            _save_step(checkpointer, own, 2)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        stop()
        left = whole_steps(where)
        if left == [1]:
            _save_step(checkpointer, own, 2)
        _save_step(checkpointer, own, 3)
    return error, left


def _save_step(checkpointer, own, step) -> None:
    checkpointer.save(at_step(own, step, seed=step), model={"step": jnp.int32(step)})
    checkpointer.wait()


def _convert(own, where, start, stop) -> tuple[str | None, list[int]]:
    """Version 1, then version 2 on the failing disk, then on one that works again."""
    source, error = where.parent / "checkpoint", None
    if not source.exists():
        with Checkpointer(source, own) as checkpointer:
            _save_step(checkpointer, own, 1)
    if where.name != "none":
        convert_to_bundle(source, where, version=1)
        start()
    try:
        convert_to_bundle(source, where, version=2, exported=b"model")
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    stop()
    left = sorted(int(path.name) for path in where.iterdir()) if where.exists() else []
    if left == [1]:
        convert_to_bundle(source, where, version=2)
    return error, left


def fill(directory: pathlib.Path) -> None:
    """Saves steps until the file system is full, then restores the last."""
    own = embedding(1, feature_config(rows=20_000))
    with Checkpointer(directory, own, max_to_keep=None) as checkpointer:
        try:
            for step in range(1, 100):
                _save_step(checkpointer, own, step)
        except Exception as e:
            print(str(e).splitlines()[0][-200:])
        restored = checkpointer.restore()
        tables, expected = (
            own.to_canonical(state)[0]
            for state in (restored.state, at_step(own, restored.step, seed=restored.step))
        )
        print("restored", restored.step, all(bool((tables[name] == expected[name]).all()) for name in tables))


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(pathlib.Path(sys.argv[2]))
    else:
        main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
