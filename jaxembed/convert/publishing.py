"""A new file or folder is written beside its place and renamed, so that what has a name is whole."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from jaxembed.checkpoint.files import sync_folder
from jaxembed.checkpoint.scratch import check_place, publish, scratch_folder


def check_new(place: pathlib.Path) -> None:
    """Whether there can be a new file or folder at `place`.

    Raises:
      ValueError: if something is there, or nothing can be.
      OSError: if nothing can be written there.
    """
    if os.path.lexists(place):
        raise _taken(place)
    check_place(place)


@contextlib.contextmanager
def published(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `place` once it is whole; what is beside it in its folder is removed.

    Raises:
      ValueError: if something came to `place` meanwhile.
      OSError: if it cannot be made.
    """
    with scratch_folder(place.parent, place.name) as folder:
        # A name of its own: that of the place may be one of what a writer has beside it. Its suffix says what to write.
        scratch = folder / f"out{place.suffix}"[:32]
        yield scratch
        _sync(scratch)
        publish(scratch, place, _taken(place))


def _taken(place: pathlib.Path) -> ValueError:
    return ValueError(f"{place} exists; pass another path or remove it.")


def _sync(path: pathlib.Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_folder(file)
