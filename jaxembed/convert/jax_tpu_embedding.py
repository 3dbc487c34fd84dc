"""Embedding variables of jax-tpu-embedding: {stack: EmbeddingVariables(table, slot)}, as Orbax saves them.

Where a table is in its stack only the EmbeddingSpecProto says, which `create_proto_from_feature_specs` of
jax-tpu-embedding makes: a file `embedding_spec.pb` beside the arrays, or the one that is given as layout.

    FOLDER/
      embedding_spec.pb   the proto, serialized
      variables/          Orbax arrays; the folder itself may be those instead
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import read_regular, write_file
from jaxembed.checkpoint.stored import StoredArray, open_array
from jaxembed.checkpoint.writing import write_arrays
from jaxembed.convert.arrays import refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream, stored
from jaxembed.convert.keys import place_arrays
from jaxembed.convert.mapped import temporary_mapped
from jaxembed.convert.sidecar import MAX_SIDECAR, SIDECAR, read_sidecar, sidecar_of
from jaxembed.convert.stacks import common_slots, new_stack
from jaxembed.serialization import strict_json
from jaxembed.sparsecore_layout import StackedTable, from_jax_tpu_embedding

#: What takes `Options.layout`.
LAYOUT = ("read", "write")
SPEC, VARIABLES = "embedding_spec.pb", "variables"
TABLE, SLOT = "table", "slot"
MAX_JSON = 64 << 20
#: TensorFlow's names of slots by theirs.
SLOTS_OF_TENSORFLOW = {
    "accumulator": "accumulators",
    "momentum": "momenta",
    "velocity": "velocities",
    "linear": "linears",
}


def matches(path: pathlib.Path) -> bool:
    """Whether it is a folder with such a proto, or one of Orbax."""
    return (path / SPEC).is_file() or (path / "_METADATA").is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens it; a stack is copied to a temporary file when the first of its rows is asked for."""
    folder = path / VARIABLES if (path / VARIABLES).is_dir() else path
    keys = _keys(folder)
    arrays: dict[str, StoredArray] = {}
    places: dict[str, Place] = {}
    for stack, members in _stacks(path, options).items():
        found = {key: names for key, names in keys.items() if names[0] == stack}
        if (stack, TABLE) not in found.values():
            raise ValueError(
                f"{folder} has no table of stack {stack!r}, which the layout names; it has {sorted(keys)}."
            )
        for key, names in found.items():
            whole = _Stack(open_array(folder, key, f"{folder}: {key}"))
            for member in members:
                name = f"{key}#{member.name}"
                arrays[name] = whole.member(member)
                if names[1:] == (TABLE,):
                    places[name] = (member.name, None)
                elif len(names) == 3 and names[1] == SLOT and names[2] in SLOTS_OF_TENSORFLOW:
                    places[name] = (member.name, SLOTS_OF_TENSORFLOW[names[2]])
    tables, slots, notes = place_arrays(path, arrays, options, lambda key, _: places.get(key))
    sidecar = path / SIDECAR
    known = read_sidecar(sidecar, read_regular(sidecar, MAX_SIDECAR)) if sidecar.exists() else {}
    return Source(tables, slots, notes=notes, **known)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, float32; of names, shapes and slots, those of the layout."""
    del out
    refuse_types(contents, "jax-tpu-embedding", ("float32",))
    sidecar_of(contents)
    _placed(contents)


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes stacks as the layout says, put together in files, not in memory; their padding is that of `new_stack`."""
    placed = _placed(contents)
    wholes: dict[tuple[str, ...], Any] = {}
    for stream, member, path in placed:
        if path not in wholes:
            file = out.parent / f"stack-{len(wholes)}"
            wholes[path] = new_stack(file, member.stack_shape, stream, contents)
        for start, rows in stream.blocks():
            member.write_rows(wholes[path], start, rows)
    out.mkdir()
    arrays = {path: (whole.shape, whole.dtype, [(0, whole)]) for path, whole in wholes.items()}
    write_arrays(out / VARIABLES, arrays)
    assert contents.options.layout is not None
    write_file(out / SPEC, [read_regular(contents.options.layout, MAX_JSON)])
    write_file(out / SIDECAR, [sidecar_of(contents)])
    return [f"table {m.name!r} -> stack {m.stack!r}" for stream, m, _ in placed if stream.slot is None]


def _placed(contents: Contents) -> list[tuple[Stream, StackedTable, tuple[str, ...]]]:
    """Each array with its place in a stack, and the path of that one among the variables."""
    stacks = _stacks(None, contents.options)
    members = {member.name: member for stack in stacks.values() for member in stack}
    theirs = {ours: name for name, ours in SLOTS_OF_TENSORFLOW.items()}
    placed = []
    for stream in contents.streams:
        member = members.get(stream.table)
        if member is None:
            raise ValueError(f"the layout has no table {stream.table!r}, only {sorted(members)}.")
        path = (
            (member.stack, TABLE) if stream.slot is None else (member.stack, SLOT, theirs.get(stream.slot, ""))
        )
        if not path[-1]:
            raise ValueError(f"jax-tpu-embedding has no slot {stream.slot!r}; it has {sorted(theirs)}.")
        if stream.shape != member.shape:
            raise ValueError(
                f"table {stream.table!r} must be {list(member.shape)} by the layout, got {list(stream.shape)}."
            )
        placed.append((stream, member, path))
    missing = members.keys() - {stream.table for stream in contents.tables}
    if missing:
        raise ValueError(f"the layout has the tables {sorted(missing)}, which are not to be written.")
    slots: dict[str, list[str]] = {name: [] for name in members}
    for stream in contents.slots:
        slots[stream.table].append(str(stream.slot))
    for stack, tables in stacks.items():
        common_slots(stack, {table.name: slots[table.name] for table in tables})
    return placed


class _Stack:
    """A stack, whose rows are asked for in the order of its tables, each from all of its shards.

    Orbax's chunks are as large as a shard may be, and one is unpacked as a whole for any row. So it is copied, chunk
    by chunk, to a temporary file that has no name, where rows are at hand, until the last row of each table was read.
    """

    def __init__(self, array: StoredArray):
        self._array, self._rows = array, None
        self._members, self._read = set[str](), set[str]()
        # With pmap there is an axis of devices before the rows.
        self._shape = (-1, *array.shape[-1:]) if len(array.shape) == 3 else array.shape

    def member(self, table: StackedTable) -> StoredArray:
        """One table of it."""
        what = f"{self._array.what}, table {table.name!r}"
        size = int(np.prod(self._array.shape, dtype=np.int64))
        if size != int(np.prod(table.stack_shape, dtype=np.int64)) or self._array.shape[-1] != table.width:
            raise ValueError(
                f"{what} must be of a stack {list(table.stack_shape)}, got {list(self._array.shape)}."
            )

        self._members.add(table.name)

        def read_rows(start: int, stop: int) -> np.ndarray:
            if self._rows is None:
                self._rows = self._copy().reshape(self._shape)
            rows = table.read_rows(self._rows, start, stop)
            if stop == table.shape[0]:
                self._read.add(table.name)
            if self._read == self._members:
                self._rows, self._read = None, set()
            return rows

        return stored(what, table.shape, self._array.dtype, read_rows)

    def _copy(self) -> np.ndarray:
        source = self._array.source
        chunk = source.chunk_layout.read_chunk.shape[0] or source.shape[0]
        rows = temporary_mapped(self._array.dtype, self._array.shape)
        for start in range(0, source.shape[0], chunk):
            part = source[start : min(start + chunk, source.shape[0])]
            try:
                rows[start : start + chunk] = part.read().result()
            except Exception as e:  # tensorstore raises many types
                raise CheckpointError(
                    f"{self._array.what} cannot be read, or is damaged: {str(e)[:300]}"
                ) from e
        return rows


def _keys(folder: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """The keys of Orbax's arrays, with the names they are made of."""
    try:
        tree = strict_json(read_regular(folder / "_METADATA", MAX_JSON))["tree_metadata"]
        paths = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in tree.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{folder} is no folder of arrays that Orbax saved, or is damaged: {str(e)[:300]}"
        ) from e
    return {".".join(path): path for path in paths}


def _stacks(path: pathlib.Path | None, options: Options) -> Mapping[str, tuple[StackedTable, ...]]:
    file = options.layout
    if file is None and path is not None:
        file = next((f for f in (path / SPEC, path.parent / SPEC) if f.is_file()), None)
    if file is None:
        raise ValueError(
            "jax-tpu-embedding's variables do not say where tables are in their stacks; write "
            "create_proto_from_feature_specs(...).SerializeToString() to a file, and pass it as layout (--layout), or "
            f"put it beside the arrays as {SPEC}."
        )
    name = "jax_tpu_embedding.sparsecore.lib.proto.embedding_spec_pb2"
    spec: Any = needed(name, "jax-tpu-embedding").EmbeddingSpecProto()
    try:
        spec.ParseFromString(read_regular(file, MAX_JSON))
    except Exception as e:  # protobuf's DecodeError is of no common type
        raise CheckpointError(f"{file} is no EmbeddingSpecProto, or is damaged: {str(e)[:200]}") from e
    if not spec.stacked_table_specs:
        raise ValueError(f"{file} is no EmbeddingSpecProto: it has no stacks.")
    return {stack.stack_name: from_jax_tpu_embedding(stack) for stack in spec.stacked_table_specs}
