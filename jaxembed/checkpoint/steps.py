"""Which steps of a checkpoint are whole, and what is left of others.

Orbax writes a step beside its place and renames it, and a step that is to be deleted is renamed away first. Others who
delete one may leave some of its parts.
"""

import pathlib
import shutil
import time

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.files import read_regular
from jaxembed.serialization import strict_json

#: In bytes: what Orbax says about a step.
MAX_ORBAX = 1 << 20


def whole_steps(directory: str | pathlib.Path) -> list[int]:
    """The steps below `directory` that can be restored, in order."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if _is_number(p.name) and _is_whole(p))


def latest_step(directory: str | pathlib.Path) -> int | None:
    """The last of `whole_steps`, or None."""
    return max(whole_steps(directory), default=None)


def remove_unfinished(directory: pathlib.Path, seconds: float = 10.0) -> None:
    """Removes what is left of steps that were being written or deleted; for the only writer.

    Files may still come from the threads of a save that failed: it is tried again for some seconds.
    """
    until = time.monotonic() + seconds
    remove_deleted(directory)
    for path in directory.glob(f"*{layout.UNFINISHED}*"):
        if path.is_dir() and path.name.split(".")[0].isdecimal():
            shutil.rmtree(path, ignore_errors=True)
            while path.exists() and time.monotonic() < until:
                time.sleep(0.1)
                shutil.rmtree(path, ignore_errors=True)


def remove_deleted(directory: pathlib.Path) -> None:
    """Removes the steps that Orbax has renamed away, which it never does itself; for the only writer."""
    for path in (directory / layout.DELETING).glob("*"):
        if path.is_dir() and path.name.isdecimal():
            shutil.rmtree(path, ignore_errors=True)


def step_directory(path: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
    """The directory of one step: `path` itself if it is one, else below it (default: the latest).

    Raises:
      FileNotFoundError: if there is no such whole step.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: it is not a directory.")
    if step is None and _is_whole(path):
        return path
    steps = whole_steps(path)
    if not steps:
        raise FileNotFoundError(
            f"no checkpoint at {path}: it holds no finished step; pass the directory given to "
            "jaxembed.train.Checkpointer, or one step in it."
        )
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise FileNotFoundError(f"no step {step} at {path}; whole steps are {steps}.")
    return path / str(step)


def _is_number(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _is_whole(step: pathlib.Path) -> bool:
    """Whether all parts that Orbax names are there; what is in their files shows when they are read."""
    try:
        parts = strict_json(read_regular(step / "_CHECKPOINT_METADATA", MAX_ORBAX))["item_handlers"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return parts >= {layout.MANIFEST, layout.TABLES} and all(
        _is_part(step / part, part in (layout.MANIFEST, layout.DATA))
        for part in (layout.MANIFEST, layout.TABLES, layout.SLOTS, layout.MODEL, layout.DATA)
        if part in parts
    )


def _is_part(part: pathlib.Path, is_json: bool) -> bool:
    if is_json:
        return (part / "metadata").is_file()
    if not (part / "_METADATA").is_file() or not (part / "manifest.ocdbt").is_file():
        return False
    # Where Orbax wrote it, rows lie in the folders of processes, and in its own the tree over them.
    is_orbax = any((part / name).exists() for name in ("array_metadatas", "_sharding", "commit_success.txt"))
    rows = [process / "d" for process in part.glob("ocdbt.process_*")] if is_orbax else [part / "d"]
    return _is_filled(part / "d") and any(map(_is_filled, rows))


def _is_filled(folder: pathlib.Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # there is none, or no longer
        return False
