"""Tables that TensorFlow's SparseCores keep in stacks: read as tables of their own, and written as stacks.

`SparseCoreTableLayouts` says where in a stack a table is. A checkpoint of TPUEmbeddingV2 has one; to write stacks it is
given as `layout`, serialized or as such a checkpoint. TPUEmbeddingV2 of TensorFlow 2.21 restores tables that are not
stacked, or otherwise than its own, too, but not their slots, nor tables whose names have a "." or "/".

References:
  tensorflow/core/tpu/kernels/sparse_core_layout.proto; `tpu_embedding_v3_checkpoint_adapter.py` of TensorFlow.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import read_regular
from jaxembed.checkpoint.stored import BLOCK_BYTES, StoredArray
from jaxembed.convert.interface import Contents, Stream, stored
from jaxembed.convert.stacks import common_slots, new_stack
from jaxembed.sparsecore_layout import StackedTable, check_stack, from_tensorflow

#: The name under which an embedding object tracks its layouts.
LAYOUTS = "_sparse_core_table_layouts"
MAX_LAYOUTS = 64 << 20

#: By stack.
Layouts = dict[str, list[StackedTable]]


def parse_layouts(what: Any, content: bytes) -> Layouts:
    """The tables of each stack, of a serialized SparseCoreTableLayouts.

    Raises:
      ValueError: if it is none, or tables do not fit into their stacks.
    """
    from tensorflow.core.tpu.kernels import sparse_core_layout_pb2

    module: Any = sparse_core_layout_pb2  # its classes are made when it is imported
    layouts = module.SparseCoreTableLayouts()
    try:
        layouts.ParseFromString(content)
    except Exception as e:  # protobuf's DecodeError is of no common type
        raise CheckpointError(f"{what} is no SparseCoreTableLayouts, or is damaged: {str(e)[:200]}") from e
    stacks: Layouts = {}
    for layout in layouts.tables:
        table = from_tensorflow(layout)
        stacks.setdefault(table.stack, []).append(table)
    for tables in stacks.values():
        check_stack(tables)
    return stacks


def layouts_in_file(file: pathlib.Path) -> tuple[bytes, Layouts]:
    """A serialized SparseCoreTableLayouts, as it is and as the tables of each stack.

    Raises:
      ValueError: if it is none, or has no tables.
    """
    content = read_regular(file, MAX_LAYOUTS)
    layouts = parse_layouts(file, content)
    if not layouts:
        raise ValueError(f"{file} is no SparseCoreTableLayouts: it has no tables.")
    return content, layouts


def unstacked(stack: StoredArray, table: StackedTable) -> StoredArray:
    """The rows of one table in a stack.

    Raises:
      ValueError: if the stack is of another shape than its layout says.
    """
    if stack.shape not in (table.stack_shape, table.stack_shape[:1]):
        raise ValueError(
            f"{stack.what} must be {list(table.stack_shape)} by its layout, got {list(stack.shape)}."
        )
    shape = table.shape[: len(stack.shape)]

    def read_rows(start: int, stop: int) -> np.ndarray:
        return table.read_rows(_Whole(stack), start, stop)

    return stored(f"{stack.what}, table {table.name!r}", shape, stack.dtype, read_rows)


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of an embedding object, to be written.

    Attributes:
      owner: name of the table or stack.
      slot: of the slot, None for the rows.
      shape: of the whole.
      streams: the arrays it is made of: one, or those of a stack's tables.
      members: where in the stack those are; empty where the variable is the array itself.
      contents: that it is of.
    """

    owner: str
    slot: str | None
    shape: tuple[int, ...]
    streams: tuple[Stream, ...]
    members: tuple[StackedTable, ...]
    contents: Contents

    def blocks(self, scratch: pathlib.Path) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) in order.

        Args:
          scratch: a new file, in which a stack is put together: it needs no memory. Its padding is that of `new_stack`.
        """
        if not self.members:
            yield from self.streams[0].blocks()
            return
        whole = new_stack(scratch, self.shape, self.streams[0], self.contents)
        for stream, member in zip(self.streams, self.members, strict=True):
            for start, rows in stream.blocks():
                member.write_rows(whole, start, rows)
        step = max(BLOCK_BYTES // (whole.nbytes // whole.shape[0]), 1)
        for start in range(0, whole.shape[0], step):
            yield start, np.asarray(whole[start : start + step])
        scratch.unlink()


def variables_of(contents: Contents, layouts: Layouts | None) -> list[Variable]:
    """What to write: tables and slots as they are, or in their stacks.

    Raises:
      ValueError: if layouts and tables do not fit.
    """
    if layouts is None:
        return [Variable(s.table, s.slot, s.shape, (s,), (), contents) for s in contents.streams]
    members = {member.name: member for tables in layouts.values() for member in tables}
    tables = {stream.table: stream for stream in contents.tables}
    if members.keys() != tables.keys():
        raise ValueError(
            f"the layout has the tables {sorted(members)}, to be written are {sorted(tables)}; give the layout "
            "of an embedding of these tables, or no layout to write them unstacked."
        )
    for name, stream in tables.items():
        if stream.shape != members[name].shape:
            raise ValueError(
                f"table {name!r} must be {list(members[name].shape)} by the layout, got {list(stream.shape)}."
            )
    slots: dict[str, dict[str, Stream]] = {name: {} for name in members}
    for stream in contents.slots:
        slots[stream.table][str(stream.slot)] = stream
    return [variable for stack in layouts.values() for variable in _of_stack(stack, tables, slots, contents)]


def _of_stack(
    members: list[StackedTable],
    tables: Mapping[str, Stream],
    slots: Mapping[str, Mapping[str, Stream]],
    contents: Contents,
) -> Iterator[Variable]:
    stack = members[0].stack
    names = common_slots(stack, {member.name: slots[member.name] for member in members})
    for slot in (None, *names):
        streams = tuple(tables[m.name] if slot is None else slots[m.name][slot] for m in members)
        ranks = {len(stream.shape) for stream in streams}
        if len(ranks) > 1:
            raise ValueError(f"slot {slot!r} of stack {stack!r} has one value a row in some tables only.")
        yield Variable(stack, slot, members[0].stack_shape[: ranks.pop()], streams, tuple(members), contents)


class _Whole:
    """A stack as `StackedTable.read_rows` takes it."""

    def __init__(self, stack: StoredArray):
        self.shape, self.dtype, self._source = stack.shape, stack.dtype, stack.source

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._source[rows]
