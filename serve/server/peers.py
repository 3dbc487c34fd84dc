"""Peers: which workers of one server have begun, and which versions they serve, each in the name of a file.

The files are empty: a disk that is full has room for them.
"""

import contextlib
import os
import pathlib
import shutil


class Peers:
    """What this worker and the others serve.

    Args:
      state: folder that the workers share.
    """

    def __init__(self, state: str | pathlib.Path):
        self._folder = pathlib.Path(state) / "serving"
        self._withdrawn = False
        self._seen: dict[int, int] = {}

    def clear(self) -> None:
        """Makes the folder, empty: what is in it is of workers that are gone."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def begin(self) -> None:
        """This worker has imported what it needs, and takes requests."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begun(os.getpid()).touch()

    def has_begun(self, pid: int) -> bool:
        """Whether a worker that is not forgotten came so far; False if it cannot be told, as of a disk that fails."""
        return os.path.exists(self._begun(pid))

    def serve(self, version: int) -> None:
        """This worker serves `version` from now on."""
        if not self._withdrawn:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"{os.getpid()}-{version}"
            file.touch()
            self._withdraw(os.getpid(), but=file)

    def withdraw(self) -> None:
        """This worker serves nothing any more."""
        self._withdrawn = True
        self._withdraw(os.getpid())

    def forget(self, pid: int) -> None:
        """A worker is gone."""
        self._withdraw(pid)
        self._begun(pid).unlink(missing_ok=True)

    def others(self) -> dict[int, int]:
        """By process, the versions that other workers serve; what was seen last while a disk fails."""
        with contextlib.suppress(OSError):
            self._seen = self.look()
        return self._seen

    def look(self) -> dict[int, int]:
        """As `others`.

        Raises:
          OSError: if it cannot be told.
        """
        found: dict[int, int] = {}
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:  # cleaned up by somebody
            return found
        for name in names:
            pid, _, version = name.partition("-")
            if pid.isdecimal() and version.isdecimal() and int(pid) != os.getpid():
                found[int(pid)] = max(int(version), found.get(int(pid), -1))
        return found

    def _begun(self, pid: int) -> pathlib.Path:
        return self._folder / f"{pid}-begun"

    def _withdraw(self, pid: int, but: pathlib.Path | None = None) -> None:
        for file in self._folder.glob(f"{pid}-[0-9]*"):
            if file != but:
                file.unlink(missing_ok=True)
