"""MetricFiles: the files that prometheus_client maps in a worker, with room for them on the disk.

It makes them without. What writes to a mapped file that has no room is ended by the system (SIGBUS): no counters are
better than no server.
"""

import contextlib
import json
import os
import pathlib
import sys

_KINDS = ("counter", "histogram", "gauge_livemax", "gauge_livesum")
# As much as prometheus_client begins with; it doubles what is full.
_BYTES = 1 << 16
#: For one worker.
METRIC_BYTES = _BYTES * len(_KINDS)
# Of one value, beside the label.
_ENTRY_BYTES = 1024


class MetricFiles:
    """Those of one process.

    Args:
      folder: where prometheus_client looks for them, before it does.
      process: in their names.

    Raises:
      OSError: if there is no room; then none is left but those that were there before.
    """

    def __init__(self, folder: str | pathlib.Path, process: int):
        files = [pathlib.Path(folder) / f"{kind}_{process}.db" for kind in _KINDS]
        self._counters = files[0]
        made = []
        try:
            for file in files:
                # One of another process that had this number, as the worker that died before this one, counts on.
                if not file.exists():
                    made.append(file)
                    _make(file)
        except OSError:
            for file in made:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            raise

    def has_room(self, label: str) -> bool:
        """Whether there is room for one more counter, with this label; if need be, it is made."""
        try:
            with open(self._counters, "r+b", buffering=0) as file:
                used, size = int.from_bytes(file.read(4), sys.byteorder), os.fstat(file.fileno()).st_size
                if used + len(json.dumps(label)) + _ENTRY_BYTES > size:
                    try:
                        _fill(file.fileno(), size, size)
                    except OSError:
                        file.truncate(size)
                        raise
        except OSError:
            return False
        return True


def _make(file: pathlib.Path) -> None:
    scratch = file.with_suffix(".new")  # others read what is there, and find nothing in an empty file
    try:
        with open(scratch, "wb", buffering=0) as f:
            _fill(f.fileno(), 0, _BYTES)
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def _fill(descriptor: int, offset: int, size: int) -> None:
    """Zeros, of which each has its place on the disk; macOS has no other way to ask for that."""
    zeros = memoryview(bytes(size))
    while zeros:
        written = os.pwrite(descriptor, zeros, offset)
        zeros, offset = zeros[written:], offset + written
