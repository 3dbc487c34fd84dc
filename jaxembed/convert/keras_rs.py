"""Weights files of Keras models with keras-rs's DistributedEmbedding, on devices without SparseCore.

A table is the only variable of a layer of its name below `_default_device_embedding_layers`. To write, a weights
file of the model is needed (layout): the order of its layers is the model's, so its tables are replaced in a copy.
On SparseCore the layer's own variables are stacks of tables, in an order of rows that the file does not say. They are
told by what they are, as a layer lies at the name of its class, or of the model's attribute; a layer of another class may
look so, too, so that tables beside it are read.
"""

import os
import pathlib
import shutil
import threading
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, read_regular
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.arrays import native, refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream, stored
from jaxembed.convert.keys import key_for, place_arrays

#: What takes `Options.layout`.
LAYOUT = ("write",)
COMBINER_WEIGHTS = False
KEYS = True
LAYERS = "_default_device_embedding_layers/"
_OPTIMIZER = "optimizer/"
_ELSE = "if it is none, name the tables with keys (--keys)"
_TILE = 8  # to multiples of which SparseCores round rows and columns up


def matches(path: pathlib.Path) -> bool:
    """Whether it is a .h5 file."""
    return path.suffix == ".h5" and path.is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens the file; rows are read as they are asked for."""
    file = _open(path, "r")
    arrays, names, stacks = _datasets(file)
    taken = names.keys() if options.keys is None else options.keys.keys()
    if taken:
        _refuse_stacks(path, stacks & taken)
    elif stacks:
        raise ValueError(f"{path}: {_about(stacks)}; {_ELSE}.")
    lock = threading.Lock()

    def array_of(key: str, dataset: Any) -> StoredArray:
        dtype = native(dataset.dtype)

        def read_rows(start: int, stop: int) -> np.ndarray:
            with lock:
                try:
                    return np.asarray(dataset[start:stop], dtype)
                except (OSError, ValueError, RuntimeError) as e:
                    raise ValueError(f"{path}: {key} cannot be read: {str(e)[:200]}.") from e

        return stored(f"{path}: {key}", dataset.shape, dtype, read_rows)

    def guess(key: str, array: StoredArray) -> Place | None:
        del array
        return (names[key], None) if key in names else None

    found = {key: array_of(key, dataset) for key, dataset in arrays.items()}
    tables, slots, notes = place_arrays(path, found, options, guess)
    if stacks and options.keys is None:
        notes += (f"not read: {_about(stacks)}",)
    return Source(tables, slots, notes=notes)


def without_slots(out: pathlib.Path) -> str:
    """Slots are the optimizer's variables in Keras, in an order that is the model's."""
    del out
    return "which a weights file has as the optimizer's, by number alone"


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, names and shapes, those of the weights file that it is written into a copy of."""
    del out
    refuse_types(contents, "a weights file of Keras", ("float32", "float16", "float64"))
    template = contents.options.layout
    if template is None:
        raise ValueError(
            "a weights file of Keras is written into a copy of one of the model; save one with "
            "model.save_weights and pass it as layout (--layout)."
        )
    with _open(template, "r") as file:
        _places(template, file, contents)


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a copy of the given weights file with these tables, for `model.load_weights`."""
    template = contents.options.layout
    assert template is not None  # as `check` found
    descriptor, _ = open_regular(template)
    with open(descriptor, "rb") as source, open(out, "xb") as target:
        shutil.copyfileobj(source, target, 16 << 20)
    notes = []
    with _open(out, "r+") as file:
        arrays, names, _ = _datasets(file)
        for stream, key in _places(template, file, contents):
            names.pop(key, None)
            for start, rows in stream.blocks():
                file[key][start : start + rows.shape[0]] = rows
            notes.append(f"table {stream.table!r} -> {key}")
    kept = [f"tables {', '.join(sorted(names.values()))}"] if names else []
    if any(key.startswith(_OPTIMIZER) for key in arrays):
        kept.append("the state of the optimizer, which is not that of these tables")
    return notes + ([f"as they were in {template}: {'; '.join(kept)}"] if kept else [])


def _places(template: pathlib.Path, file: Any, contents: Contents) -> list[tuple[Stream, str]]:
    """Each table with the name of its array in the file."""
    arrays, names, stacks = _datasets(file)
    found: dict[str, Stream] = {}
    for stream in contents.tables:
        key = key_for(contents.options, (stream.table, None))
        keys = [key] if key is not None else [k for k, name in names.items() if name == stream.table]
        if len(keys) != 1 or keys[0] not in arrays:
            may_be = f" {_about(stacks)}; {_ELSE}." if stacks and not keys else ""
            raise ValueError(
                f"{template} has no table {stream.table!r}; it has {sorted(names.values())}.{may_be}"
            )
        _refuse_stacks(template, stacks & {keys[0]})
        if keys[0] in found:
            raise ValueError(
                f"tables {found[keys[0]].table!r} and {stream.table!r} would both be {keys[0]}; give one another key."
            )
        dataset = arrays[keys[0]]
        if (dataset.shape, dataset.dtype) != (stream.shape, stream.dtype):
            raise ValueError(
                f"{template}: {keys[0]} must be {stream.dtype.name}{list(stream.shape)}, got "
                f"{dataset.dtype.name}{list(dataset.shape)}."
            )
        found[keys[0]] = stream
    return [(stream, key) for key, stream in found.items()]


def _refuse_stacks(path: pathlib.Path, stacks: Set[str]) -> None:
    if stacks:
        raise ValueError(f"{path}: {_about(stacks)}.")


def _about(stacks: Set[str]) -> str:
    return (
        f"{min(stacks)} looks like a stack of tables on SparseCores, whose rows lie in an order that the file does not say; "
        "use layer.get_embedding_tables() and layer.set_embedding_tables(...) instead: what "
        "np.savez(FILE, **layer.get_embedding_tables()) saves can be converted, and to npz back"
    )


def _open(path: pathlib.Path, mode: str) -> Any:
    h5py: Any = needed("h5py", "keras-rs")
    # Of links, pipes and Git LFS pointers the error is clearer than HDF5's.
    if path.stat().st_size < 4096:
        read_regular(path, 4096)
    else:
        descriptor, _ = open_regular(path)
        os.close(descriptor)
    try:
        return h5py.File(path, mode)
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path} is no HDF5 file, or is damaged: {str(e)[:200]}.") from e


def _datasets(file: Any) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """The arrays of numbers by path, the names of the tables among them, and the stacks of tables."""
    h5py: Any = needed("h5py", "keras-rs")
    arrays: dict[str, Any] = {}
    names: dict[str, str] = {}

    def visit(key: str, item: Any) -> None:
        key = key if isinstance(key, str) else os.fsdecode(key)
        # A dataset may lie in other files, which nobody gave.
        if (
            not isinstance(item, h5py.Dataset)
            or item.external
            or item.is_virtual
            or item.dtype.kind not in "fiu"
        ):
            return
        arrays[key] = item
        name = item.parent.attrs.get("name")
        if LAYERS in key and item.ndim == 2 and isinstance(name, str | bytes):
            names[key] = name if isinstance(name, str) else name.decode(errors="replace")

    try:
        file.visititems(visit)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, OverflowError) as e:
        raise CheckpointError(f"{file.filename} is damaged: {str(e)[:200]}.") from e
    return arrays, names, _stacks(arrays)


def _stacks(arrays: Mapping[str, Any]) -> set[str]:
    """The arrays of layers that have their own count of steps, a float, beside tables and slots, and nothing else."""
    layers: dict[str, list[str]] = {}
    for key in arrays:
        layers.setdefault(key.rpartition("/")[0], []).append(key)
    found: set[str] = set()
    for keys in layers.values():
        tables = [key for key in keys if arrays[key].ndim == 2]
        rest = [(arrays[key].shape, arrays[key].dtype.kind) for key in keys if arrays[key].ndim != 2]
        if rest == [((), "f")] and not any(size % _TILE for key in tables for size in arrays[key].shape):
            found.update(tables)
    return found
