"""Folders that are written beside their place and renamed, so that what has a name is whole."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

PREFIX = ".writing-"
#: A folder that is being made is not locked yet.
GRACE_SECONDS = 60


@contextlib.contextmanager
def scratch_folder(parent: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """A new folder below `parent`, to be renamed once it is whole; what is left of it is removed.

    A process that is killed leaves its folder behind, and the next one to write here removes it: it takes the
    lock, which the kernel gave back. Where the file system has no locks, it stays.

    Raises:
      OSError: if it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(other)
    folder = parent / f"{PREFIX}{name}-{os.getpid()}"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime < GRACE_SECONDS:
            return
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
