"""SharedTables: tables in memory, one copy of each for all workers of a server and all versions that have it."""

import contextlib
import fcntl
import functools
import json
import math
import os
import pathlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxembed.memory import ALIGNMENT
from jaxembed.serve.table_memory import Arrays, copy_arrays

from .shared_memory import HUGE_PAGE, SharedMemory, is_available

_LOCK, _LEDGER = "tables.lock", "tables.json"


class SharedTables:
    """Tables by their digests. A file says which processes hold which; one worker copies while the others wait.

    Args:
      folder: that the workers share.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._held: weakref.WeakValueDictionary[str, SharedMemory] = weakref.WeakValueDictionary()
        folder.mkdir(parents=True, exist_ok=True)

    def copy(self, digest: str, arrays: Arrays) -> Arrays:
        """The arrays of one table, in memory; that of another worker or version where there is such a table.

        Small ones are copied for this process alone: they gain nothing from huge pages.

        Args:
          digest: of the table.
          arrays: by name of the part.
        """
        offsets, size = {}, 0
        for part, array in arrays.items():
            offsets[part] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if size < HUGE_PAGE:
            return copy_arrays(digest, arrays)
        memory = self._held.get(digest)
        if memory is None:
            with self._locked():
                memory = self._find(digest, size) or SharedMemory.create(
                    {offsets[part]: array for part, array in arrays.items()}, size
                )
                self._note(digest, memory)
            self._held[digest] = memory
        content = np.asarray(memory)
        return {
            part: content[offsets[part] : offsets[part] + math.prod(array.shape) * array.itemsize]
            .view(array.dtype)
            .reshape(array.shape)
            for part, array in arrays.items()
        }

    def _find(self, digest: str, size: int) -> SharedMemory | None:
        entry = self._ledger().get(digest, {"holders": [], "inode": 0})
        found = (SharedMemory.open(pid, fd, entry["inode"], size) for pid, fd in entry["holders"])
        return next((memory for memory in found if memory is not None), None)

    def _note(self, digest: str, memory: SharedMemory) -> None:
        """Writes down that this process holds a table, and forgets what processes held that are gone."""
        ledger = self._ledger()
        entry = ledger.get(digest)
        if entry is None or entry["inode"] != memory.inode:
            entry = ledger[digest] = {"inode": memory.inode, "holders": []}
        entry["holders"].append([os.getpid(), memory.descriptor])
        for known in ledger.values():
            known["holders"] = [
                holder for holder in known["holders"] if _holds(holder[0], holder[1], known["inode"])
            ]
        scratch = self._folder / f".{_LEDGER}-{os.getpid()}"
        try:
            scratch.write_text(
                json.dumps({digest: known for digest, known in ledger.items() if known["holders"]})
            )
            os.replace(scratch, self._folder / _LEDGER)
        except OSError:  # on a full disk, others make a copy of their own
            scratch.unlink(missing_ok=True)

    def _ledger(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / _LEDGER).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / _LOCK, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def forget_tables(folder: pathlib.Path) -> None:
    """Forgets who holds which: after the machine was started anew, others hold other tables by the same numbers."""
    (folder / _LEDGER).unlink(missing_ok=True)


@functools.cache
def shared_tables(folder: pathlib.Path) -> SharedTables | None:
    """The tables that workers with this folder share; None where they cannot."""
    return SharedTables(folder) if is_available() else None


def _holds(pid: int, descriptor: int, inode: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_ino == inode
    except OSError:
        return False
