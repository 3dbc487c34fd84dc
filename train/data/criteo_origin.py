"""What Criteo's columns were made from, and whether that is what a job asks for."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .file_digest import describe_file


def describe_texts(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Name, bytes, time of the last change (in ns since 1970) and XXH3 of start and end of each text, JSON-able."""
    return [
        {"name": path.name, "mtime_ns": path.stat().st_mtime_ns, **describe_file(path)}
        for path in map(Path, paths)
    ]


def check_texts(directory: Path, meta: Mapping[str, Any], paths: Sequence[str | os.PathLike[str]]) -> None:
    """Whether the columns were made from these texts.

    A text that was removed since is known by its name. One that was touched or copied is the same where its size, start and
    end are. Columns that do not say what they were made from pass.

    Raises:
      ValueError: if they were made from others, or a text was changed since.
    """
    recorded = meta.get("texts")
    if recorded is None:
        return
    names, own = [text["name"] for text in recorded], [Path(path).name for path in paths]
    difference = None if names == own else f"from {', '.join(names)}, not from {', '.join(own)}"
    for text, path in zip(recorded, paths, strict=False):
        if difference is None and Path(path).exists():
            (now,) = describe_texts([path])
            same = now["bytes"] == text["bytes"]
            # Columns of a version before have no XXH3.
            if not same or (now["mtime_ns"] != text["mtime_ns"] and now["xxh3"] != text.get("xxh3")):
                difference = (
                    f"when {path} had {text['bytes']} bytes and was last changed at {text['mtime_ns'] / 1e9:.3f}, "
                    f"now it has {now['bytes']} and was changed at {now['mtime_ns'] / 1e9:.3f} (seconds since 1970)"
                )
    if difference is not None:
        raise ValueError(
            f"the columns in {directory} were made {difference}. Remove the folder, and they are made again; or take "
            "another `path`; or take them as they are with text = []."
        )


def check_sizes(directory: Path, meta: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Whether the columns were made for these vocabulary sizes.

    Raises:
      ValueError: if not.
    """
    pairs = enumerate(zip(meta["vocabulary_sizes"], sizes, strict=True), 1)
    different = [f"c{i}: {found}, not {asked}" for i, (found, asked) in pairs if found != asked]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"the columns in {directory} were made for other vocabulary_sizes ({'; '.join(different[:3])}{more}). Remove "
            "the folder, and they are made again from `text`; or take another `path`; or leave vocabulary_sizes out to "
            "take those of the columns."
        )
