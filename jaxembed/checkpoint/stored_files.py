"""Which files the arrays of a checkpoint lie in, as the trees say under which Orbax stores them.

A part of a checkpoint is a database of OCDBT: `manifest.ocdbt` names the root of a tree, whose nodes name the files of
other nodes and of the chunks of the arrays.
"""

import functools
import pathlib
from urllib.parse import unquote

ROOT = "manifest.ocdbt"


def missing_file(part: pathlib.Path) -> pathlib.Path | None:
    """A file that the arrays of a part need and that is not there, or None; no chunk is read.

    What is damaged is not missing: those who read the arrays say what it is.
    """
    root = part / ROOT
    if not root.is_file():  # a pipe is there, and never ends
        return None if root.exists() else root
    try:
        status = root.stat()
        files = _named_files(part, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    except _MissingNodeError as error:
        return error.file
    except Exception:  # tensorstore raises many types
        return None
    return next((file for file in files if not file.exists()), None)


class _MissingNodeError(Exception):
    def __init__(self, file: pathlib.Path):
        super().__init__(str(file))
        self.file = file


# tensorstore leaks some KiB in each dump, and those who wait for a step look many times a second.
@functools.lru_cache(maxsize=256)
def _named_files(part: pathlib.Path, version: tuple[int, ...]) -> tuple[pathlib.Path, ...]:
    """The files that the trees name, in order.

    Args:
      version: of the root, which is written last.
    """
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "file", "path": f"{part}/"}).result()
    top = tensorstore.ocdbt.dump(store).result()
    nodes = {top["versions"][-1]["root"]["location"]}  # there is none in a database without arrays
    looked_at: set[str] = set()
    files: set[pathlib.Path] = set()
    while nodes:
        node = nodes.pop()
        looked_at.add(node)
        file = _path(part, _file(node))
        if not file.is_file():
            raise _MissingNodeError(file)
        entries = tensorstore.ocdbt.dump(store, node).result()["entries"]
        chunks = {_file(entry["indirect_value"]) for entry in entries if "indirect_value" in entry}
        files |= {file, *(_path(part, chunk) for chunk in chunks)}
        nodes |= {entry["location"] for entry in entries if "location" in entry} - looked_at
    return tuple(sorted(files))


def _file(location: str) -> str:
    """Of "KIND:FOLDER:NAME:OFFSET:LENGTH" all before the offset: many chunks share a file."""
    return location.rsplit(":", 2)[0]


def _path(part: pathlib.Path, location: str) -> pathlib.Path:
    _, folder, name = location.split(":")
    return part / unquote(folder) / unquote(name)
