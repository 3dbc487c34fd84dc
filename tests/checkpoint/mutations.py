"""Random changes to the files of a bundle, and to the JSON in them, for fuzzing."""

import copy
import json
import os
import pathlib
import shutil

from hypothesis import strategies as st

from jaxembed.checkpoint import layout

ODD_VALUES = [
    *(None, True, False, -1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, 1e308, -0.0, "", "x", "0", "../../secret", "/etc/passwd", "tables/00000.safetensors", "a" * 2000),
    *("é\u0000", "float32", "int8", "codes4", [], {}, [[]], [None], [-1, 4], [2**40, 2**40], {"dict": {}}),
]


class Files:
    """The files of a folder, to be changed and put back.

    Args:
      folder: holds them.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.intact = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self._touched: set[pathlib.Path] = set()

    def put(self, path: pathlib.Path, content: bytes) -> None:
        """A new file in place of the old one, whose mapped pages stay as they are."""
        self.remove(path)
        path.write_bytes(content)

    def remove(self, path: pathlib.Path) -> None:
        """Whatever is there."""
        self._touched.add(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Every file as it was."""
        for path in self._touched:
            self.remove(path)
        for path in self._touched:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.intact[path])
        self._touched = set()


def change_bytes(draw, files: Files) -> None:
    """Some bytes of a file are others, gone, or come."""
    path = draw(st.sampled_from(list(files.intact)))
    content = bytearray(files.intact[path])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        content[at : at + draw(st.sampled_from([0, 1, 1, 4, 8, 4096]))] = draw(st.binary(max_size=8))
    files.put(path, bytes(content))


def change_manifest(draw, files: Files) -> None:
    """The manifest says something else, and has the digest of that."""
    path = draw(st.sampled_from([path for path in files.intact if path.name == "manifest.json"]))
    manifest = json.loads(files.intact[path])
    manifest.pop("digest")
    manifest = _change_json(draw, manifest)
    sealed = layout.seal(manifest) if isinstance(manifest, dict) else manifest
    files.put(path, json.dumps(sealed).encode())


def change_config(draw, files: Files) -> None:
    """As `change_manifest`, within the feature configuration, which is JSON in JSON."""
    path = draw(st.sampled_from([path for path in files.intact if path.name == "manifest.json"]))
    manifest = json.loads(files.intact[path])
    manifest.pop("digest")
    config = _change_json(draw, json.loads(manifest["feature_config"]))
    files.put(path, json.dumps(layout.seal({**manifest, "feature_config": json.dumps(config)})).encode())


def change_header(draw, files: Files) -> None:
    """The header of a safetensors file says something else."""
    path = draw(st.sampled_from([path for path in files.intact if path.suffix == ".safetensors"]))
    content = files.intact[path]
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(_change_json(draw, json.loads(content[8 : 8 + length]))).encode().ljust(length)
    files.put(path, len(text).to_bytes(8, "little") + text + content[8 + length :])


def change_files(draw, files: Files) -> None:
    """A file is gone, short, long, another one, or no file at all."""
    path, other = (draw(st.sampled_from(list(files.intact))) for _ in range(2))
    content = files.intact[path]
    how = draw(
        st.sampled_from(
            ["remove", "cut", "append", "other", "link", "loop", "folder", "pipe", "pointer", "zeros"]
        )
    )
    if how == "cut":
        files.put(path, content[: draw(st.integers(0, len(content)))])
    elif how == "append":
        files.put(path, content + draw(st.binary(min_size=1, max_size=64)))
    elif how == "other":
        files.put(path, files.intact[other])
    elif how == "pointer":
        files.put(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "zeros":
        files.put(path, bytes(len(content)))
    else:
        files.remove(path)
        if how == "link":
            path.symlink_to(other if other != path else "/etc/passwd")
        elif how == "loop":
            path.symlink_to(path)
        elif how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)


#: Those that keep the digests of what they change: what is loaded may differ, but must be what the manifest says.
RESEALED = (change_manifest, change_config)
MUTATIONS = (change_bytes, change_bytes, change_manifest, change_config, change_header, change_files)


def _change_json(draw, root):
    """A copy of a JSON value in which a few things are others."""
    root = json.loads(json.dumps(root))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(root)
        if not places:
            return copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["odd", "odd", "near", "remove", "other", "nest", "rename", "string"]))
        value = holder[key]
        if how == "odd":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))  # it may be changed in its turn
        elif how == "near" and isinstance(value, int | float):
            step = draw(st.sampled_from([-1, 1, 2**31, -(2**31), 0.5]))
            holder[key] = value + (step if abs(value) < 2**1000 else 1)  # floats end there
        elif how == "remove":
            del holder[key]
        elif how == "other":
            elsewhere, other = draw(st.sampled_from(places))
            if other in elsewhere if isinstance(elsewhere, dict) else other < len(elsewhere):
                holder[key] = json.loads(json.dumps(elsewhere[other]))
        elif how == "nest":
            for _ in range(draw(st.sampled_from([1, 3, 90]))):
                holder[key] = [holder[key]]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "rows", "", "../x"]))] = holder.pop(key)
        elif how == "string" and isinstance(value, str):
            at = draw(st.integers(0, len(value)))
            holder[key] = value[:at] + draw(st.text(max_size=3)) + value[at + draw(st.integers(0, 2)) :]
    return root


def _places(value) -> list[tuple]:
    """Every (holder, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]
