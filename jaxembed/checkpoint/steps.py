"""Which steps of a checkpoint are whole, and what is left of others.

Orbax writes a step beside its place and renames it, and a step that is to be deleted is renamed away first. Others who
delete one may leave some of its parts.
"""

import itertools
import pathlib
import re
import shutil
import time

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.files import absolute_path, is_number, read_regular
from jaxembed.checkpoint.stored_files import missing_file
from jaxembed.serialization import strict_json

#: In bytes: what Orbax says about a step.
MAX_ORBAX = 1 << 20
METADATA = "_CHECKPOINT_METADATA"
#: What the name of a step that is not whole ends with, once it has been set aside.
ASIDE = ".incomplete"


def whole_steps(directory: str | pathlib.Path) -> list[int]:
    """The steps below `directory` that can be restored, in order."""
    directory = absolute_path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if is_number(p.name) and _is_whole(p))


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


def set_aside(directory: pathlib.Path) -> list[pathlib.Path]:
    """Renames the steps that are not listed, so that they do not stand in the way of new ones; for the only writer.

    Returns:
      Where they are now.
    """
    aside = []
    for path in list(directory.iterdir()):
        if not is_number(path.name) or _is_whole(path):
            continue
        suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        places = (directory / f"{path.name}{ASIDE}{suffix}" for suffix in suffixes)
        aside.append(path.rename(next(place for place in places if not place.exists())))
    return aside


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
    path = absolute_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: it is not a directory.")
    if step is None and _missing(path) is None:
        return path
    # On a network's file system the listing of a folder may lag behind what is in it.
    if step is not None and _is_whole(path / str(step)):
        return path / str(step)
    steps = whole_steps(path)
    if step is None and steps:
        return path / str(steps[-1])
    named = path if step is None else path / str(step)
    if (named / METADATA).is_file() and _missing(named) is None:
        raise FileNotFoundError(
            f"checkpoint {named} was saved as step {_saved_as(named)}; give it back its name, or restore another step."
        )
    if (named / METADATA).is_file():
        raise FileNotFoundError(
            f"checkpoint {named} is not whole, or of another program: {_missing(named)} is missing or cannot be read; "
            "restore another step."
        )
    if not steps:
        raise FileNotFoundError(
            f"no checkpoint at {path}: it holds no finished step; pass the directory given to "
            "jaxembed.train.Checkpointer, or one step in it."
        )
    raise FileNotFoundError(f"no step {step} at {path}; whole steps are {steps}.")


def _is_whole(step: pathlib.Path) -> bool:
    try:
        return _missing(step) is None and _saved_as(step) in (None, int(step.name))
    except FileNotFoundError:  # whoever writes here has deleted it meanwhile
        return False


def _saved_as(step: pathlib.Path) -> int | None:
    """The number that a whole step was saved under, which its manifest begins with; None where it does not say."""
    with open(step / layout.MANIFEST / "metadata", "rb") as f:
        found = re.search(rb'"step": ?([0-9]{1,19})\b', f.read(512))
    return found and int(found[1])


def _missing(step: pathlib.Path) -> pathlib.Path | None:
    """A file that a step needs and that is not there, or None; what is in them shows when they are read."""
    try:
        parts = strict_json(read_regular(step / METADATA, MAX_ORBAX))["item_handlers"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        return step / METADATA
    jsons, arrays = (layout.MANIFEST, layout.DATA), (layout.TABLES, layout.SLOTS, layout.MODEL)
    wanted = {layout.MANIFEST, layout.TABLES, *parts}
    files = [step / part / "metadata" for part in jsons if part in wanted]
    files += [step / part / "_METADATA" for part in arrays if part in wanted]
    missing = (file for file in files if not file.is_file())
    missing_of_arrays = (missing_file(step / part) for part in arrays if part in wanted)
    return next((file for file in itertools.chain(missing, missing_of_arrays) if file is not None), None)
