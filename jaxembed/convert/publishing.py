"""A new file or folder is written beside its place and renamed, so that what has a name is whole."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from jaxembed.checkpoint.files import sync_folder
from jaxembed.checkpoint.scratch import scratch_folder


@contextlib.contextmanager
def published(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `place` once it is whole; what is beside it in its folder is removed.

    Raises:
      OSError: if it cannot be made.
    """
    with scratch_folder(place.parent, place.name) as folder:
        scratch = folder / place.name
        yield scratch
        _sync(scratch)
        os.rename(scratch, place)
        sync_folder(place.parent)


def _sync(path: pathlib.Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_folder(file)
