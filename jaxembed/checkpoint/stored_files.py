"""Which files the arrays of a checkpoint lie in, as the trees say under which Orbax stores them.

A part of a checkpoint is a database of OCDBT: `manifest.ocdbt` names the root of a tree, whose nodes name the files of
other nodes and of the chunks of the arrays.
"""

import pathlib
from urllib.parse import unquote

ROOT = "manifest.ocdbt"


def missing_file(part: pathlib.Path) -> pathlib.Path | None:
    """A file that the arrays of a part need and that is not there, or None; no chunk is read.

    What is damaged is not missing: those who read the arrays say what it is.
    """
    import tensorstore

    if not (part / ROOT).is_file():  # a pipe is there, and never ends
        return None if (part / ROOT).exists() else part / ROOT
    try:
        store = tensorstore.KvStore.open({"driver": "file", "path": f"{part}/"}).result()
        top = tensorstore.ocdbt.dump(store).result()
        nodes = {top["versions"][-1]["root"]["location"]}  # there is none in a database without arrays
        looked_at: set[str] = set()
        while nodes:
            node = nodes.pop()
            looked_at.add(node)
            if not _path(part, _file(node)).is_file():
                return _absent(part, {_file(node)})
            entries = tensorstore.ocdbt.dump(store, node).result()["entries"]
            chunks = {_file(entry["indirect_value"]) for entry in entries if "indirect_value" in entry}
            if (file := _absent(part, chunks)) is not None:
                return file
            nodes |= {entry["location"] for entry in entries if "location" in entry} - looked_at
    except Exception:  # tensorstore raises many types
        return None
    return None


def _file(location: str) -> str:
    """Of "KIND:FOLDER:NAME:OFFSET:LENGTH" all before the offset: many chunks share a file."""
    return location.rsplit(":", 2)[0]


def _path(part: pathlib.Path, location: str) -> pathlib.Path:
    _, folder, name = location.split(":")
    return part / unquote(folder) / unquote(name)


def _absent(part: pathlib.Path, locations: set[str]) -> pathlib.Path | None:
    return next((file for place in sorted(locations) if not (file := _path(part, place)).exists()), None)
