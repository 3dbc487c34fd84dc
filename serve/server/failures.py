"""Failures: versions that cannot be served, and whether they are worth another try.

A version may be read before it is whole: its manifest was copied first, or it is a delta of one that is still to
come. So it is tried again once its files, or those of the versions that it builds on, changed and came to rest.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import FORMAT, MANIFEST_FILE, MAX_DELTAS

from .version_folder import VersionFolder

#: Path, inode, size and time of the last change of each file.
_Files = frozenset[tuple[str, int, int, int]]


@dataclasses.dataclass
class _Attempt:
    """What was there when loading began: the version, and below it those that it is a delta of."""

    versions: tuple[int, ...]
    files: _Files


@dataclasses.dataclass
class _Failure:
    identity: Any
    reason: str
    attempt: _Attempt
    again: float
    seen: _Files
    tries: int
    changed: bool = False


class Failures:
    """Those of one folder of versions.

    Args:
      directory: of the versions.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._attempt = _Attempt((), frozenset())
        self._known: dict[int, _Failure] = {}

    @property
    def reasons(self) -> dict[int, str]:
        """By version."""
        return {version: failure.reason for version, failure in list(self._known.items())}

    def begin(self, version: int) -> None:
        """Loading begins: notes what is there, on the thread that loads."""
        versions = _chain(self._directory, version)
        self._attempt = _Attempt(versions, self._files(versions))

    def add(self, version: int, identity: Any, reason: str, again: float) -> bool:
        """The loading that began last failed.

        Args:
          version: of the bundle.
          identity: which one of that number.
          reason: for people.
          again: from when on it is tried again where other workers serve it.

        Returns:
          Whether that is news.
        """
        before, attempt = self._known.get(version), self._attempt
        tries = self.tries(version, identity) + 1
        self._known[version] = _Failure(identity, reason, attempt, again, attempt.files, tries)
        return before is None or (before.identity, before.reason) != (identity, reason)

    def tries(self, version: int, identity: Any) -> int:
        """How often in a row it failed."""
        failure = self._known.get(version)
        return 0 if failure is None or failure.identity != identity else failure.tries

    def forget(self, version: int) -> None:
        """It serves, or is to be tried in any case."""
        self._known.pop(version, None)

    def look(self, folder: VersionFolder) -> None:
        """Compares with what is there now, on the thread that loads; what is gone did not fail.

        Args:
          folder: as it is.
        """
        for version, failure in list(self._known.items()):
            if version in folder.versions:
                files = self._files(failure.attempt.versions)
                failure.changed = files == failure.seen != failure.attempt.files
                failure.seen = files
            elif not folder.problems:
                self._known.pop(version, None)

    def stands(self, version: int, identity: Any, now: float, served: bool) -> bool:
        """Whether a version failed, and is not to be tried again.

        Args:
          version: of the bundle.
          identity: which one of that number.
          now: in the time of `add`'s `again`.
          served: by other workers.
        """
        failure = self._known.get(version)
        if failure is None or failure.identity != identity or failure.changed:
            return False
        return not served or now < failure.again

    def _files(self, versions: tuple[int, ...]) -> _Files:
        found = set[tuple[str, int, int, int]]()
        for version in versions:
            for folder, _, names in os.walk(self._directory / str(version)):
                for name in names:
                    file = os.path.join(folder, name)
                    with contextlib.suppress(OSError):  # it may go at any time
                        status = os.stat(file)
                        found.add((file, status.st_ino, status.st_size, status.st_ctime_ns))
        return frozenset(found)


def _chain(directory: pathlib.Path, version: int) -> tuple[int, ...]:
    """A version and those that it builds on, as far as manifests can be read."""
    chain = [version]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        while len(chain) <= MAX_DELTAS:
            below = layout.read_manifest(directory / str(chain[-1]), MANIFEST_FILE, FORMAT)["base"]["version"]
            if type(below) is not int or not 0 <= below < chain[-1]:
                break
            chain.append(below)
    return tuple(chain)
