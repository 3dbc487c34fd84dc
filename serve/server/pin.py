"""Pin: the version that a server was told to serve, in a file that outlives it."""

import json
import logging
import os
import pathlib
from typing import Any

from jaxembed.checkpoint.files import sync_folder

_FILE = "pin.json"


class Pin:
    """The version that was asked for.

    Args:
      folder: that the workers share.
      log: told once of a file that is damaged.
    """

    def __init__(self, folder: pathlib.Path, log: logging.Logger):
        self._file, self._log = folder / _FILE, log
        self._last: int | None = None
        self._reported = False

    def read(self) -> int | None:
        """The version; None to follow the newest. Of a file that is damaged, what it said before, if this process knows."""
        try:
            self._last = _version(self._file.read_bytes())
        except FileNotFoundError:
            self._last = None
        except (OSError, ValueError) as e:
            if not self._reported:
                self._log.warning(
                    "the pinned version cannot be read; activate one, or follow the newest, to write it anew",
                    extra={"file": str(self._file), "reason": str(e), "pinned": self._last},
                )
            self._reported = True
            return self._last
        self._reported = False
        return self._last

    def write(self, version: int | None) -> None:
        """Has it on the disk, or what was there before.

        Raises:
          OSError: if it cannot be written.
        """
        if version is None:
            self._file.unlink(missing_ok=True)
        else:
            scratch = self._file.with_name(f".{_FILE}-{os.getpid()}")
            try:
                with open(scratch, "w") as file:
                    json.dump({"version": version}, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, self._file)
            finally:
                scratch.unlink(missing_ok=True)
        sync_folder(self._file.parent)


def _version(content: bytes) -> int:
    try:
        found: Any = json.loads(content)["version"]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"it must be such as {{'version': 5}}, got {content[:40]!r}") from e
    if type(found) is not int:
        raise ValueError(f"version must be an int, got {found!r:.40}")
    return found
