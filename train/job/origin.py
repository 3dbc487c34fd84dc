"""What the data of a job can be known by, so that a run that goes on sees that it has changed."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from ..data.examples import Examples, RaggedColumn
from ..data.file_digest import SPAN, describe_file
from ..hosts import from_first_process, processes_where

#: Read of each of many files at its start and end at least, and of all of them together about.
_LEAST, _TOTAL = 1 << 12, 256 << 20


def describe_files(
    paths: Sequence[str | os.PathLike[str]], more: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, Any]:
    """The size of each file and the XXH3 of its start and end, JSON-able.

    A change in between that keeps the size is not seen.

    Args:
      paths: of the files.
      more: by path, counts to add.

    Returns:
      "folder", the one that all of them are in, which may be another one in another run; "files" by their names in it;
      and these in "order".
    """
    names = list(dict.fromkeys(os.fspath(path) for path in paths))
    span = min(SPAN, max(_LEAST, _TOTAL // (2 * max(len(names), 1))))
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    files = {
        os.path.relpath(name, folder): describe_file(name, span) | dict((more or {}).get(name, {}))
        for name in names
    }
    return {"folder": folder, "files": files, "order": list(files)}


def describe_arrays(examples: Examples) -> str:
    """XXH3 of starts and ends of the arrays of made-up examples: the generator may become another one."""
    digest = xxhash.xxh3_64()
    for column in (examples.dense, examples.labels, *examples.features.values()):
        arrays = (column.values, column.lengths) if isinstance(column, RaggedColumn) else (column,)
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(data[:SPAN].tobytes())
            digest.update(data[max(data.size - SPAN, 0) :].tobytes())
    return digest.hexdigest()


def difference(before: Any, now: Any) -> str | None:
    """How one origin (`Sources.origin`) differs from another, or None; what is not known does not.

    Files may be in another folder.
    """
    if before is None or now is None or {**before, "folder": None} == {**now, "folder": None}:
        return None
    files, others = before.get("files", {}), now.get("files", {})
    for what, origin, names in (
        ("are gone", before, files.keys() - others.keys()),
        ("are new", now, others.keys() - files.keys()),
    ):
        if names:
            shown = sorted(os.path.join(origin["folder"], name) for name in names)
            rest = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            return f"of its {len(files)} files {', '.join(shown[:3])}{rest} {what}"
    changed = [name for name in files if files[name] != others[name]]
    if changed:
        name, rest = changed[0], f" ({len(changed) - 1} more have changed)" if len(changed) > 1 else ""
        path = os.path.join(now["folder"], name)
        return f"{path} had {_text(files[name])}, now it has {_text(others[name])}{rest}"
    if before.get("order") != now.get("order"):
        return f"its files were in the order {before['order']}, now it is {now['order']}"
    if before.get("made") != now.get("made"):
        return (
            f"its generator made examples with XXH3 {before.get('made')}, with these versions of jaxembed and numpy "
            f"({np.__version__}) {now.get('made')}"
        )
    if "examples" not in before or "examples" not in now:
        return f"it was {before}, now it is {now}"
    return f"it had examples {_text(before['examples'])}, now {_text(now['examples'])}"


def check_hosts(origin: Any) -> None:
    """Whether all processes of the job read the same data.

    Raises:
      ValueError: on all of them, if one reads other data than process 0.
    """
    found = difference(from_first_process(origin), origin)
    differing = processes_where(found is not None)
    if found is not None:
        raise ValueError(
            f"process {jax.process_index()} reads other data than process 0 (there, now here): {found}. Give all "
            "hosts the same files."
        )
    if differing:
        raise ValueError(
            f"processes {differing} read other data than process 0; their errors say how. Give all hosts "
            "the same files."
        )


def _text(values: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in values.items()
    ]
    return ", ".join(parts)
