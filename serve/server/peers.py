"""Peers: which versions the workers of one server serve, each in a file of the folder that they share."""

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

    def clear(self) -> None:
        """Makes the folder, empty: what is in it is of workers that are gone."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def serve(self, version: int) -> None:
        """This worker serves `version` from now on."""
        if not self._withdrawn:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = self._folder / f".{os.getpid()}"
            scratch.write_text(str(version))
            os.replace(scratch, self._folder / str(os.getpid()))

    def withdraw(self) -> None:
        """This worker serves nothing any more."""
        self._withdrawn = True
        self.forget(os.getpid())

    def forget(self, pid: int) -> None:
        """A worker is gone."""
        (self._folder / str(pid)).unlink(missing_ok=True)

    def others(self) -> dict[int, int]:
        """By process, the versions that other workers serve."""
        found: dict[int, int] = {}
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:  # cleaned up by somebody
            return found
        for name in names:
            if name.isdecimal() and int(name) != os.getpid():
                with contextlib.suppress(FileNotFoundError):  # it was forgotten meanwhile
                    found[int(name)] = int((self._folder / name).read_text())
        return found
