"""Where SparseCore keeps the rows of a table: stacked with others, mod-sharded, rotated and padded.

A stack is one array [S * R, W]: S shards, one a SparseCore, of R rows each. Row i of a table is row
`row_offset + i // S` of shard `(i + rotation) % S`. Rows and columns past the table's own are padding.
TensorFlow and jax-tpu-embedding agree on this. Only numpy is needed, and a block of rows is read or
written as one slice a shard, so that a stack may be a memory map or any array that is sliced by rows.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class StackedTable:
    """The place of one table [V, D] in a stack [num_shards * shard_rows, width].

    Args:
      name: of the table.
      stack: name of the stack.
      shape: (V, D).
      num_shards: S, the number of SparseCores.
      shard_rows: R, the rows that one shard of the whole stack has.
      width: W, columns of the stack, at least D.
      row_offset: first row of the table in every shard.
      rotation: shard that row 0 is in, in [0, S).
      padded_rows: rows that are the table's in the stack, a multiple of S and at least V.

    Raises:
      ValueError: if the table does not fit into the stack.

    References:
      `tensorflow.tpu.SparseCoreTableLayout`; `SettingInStack` of jax-tpu-embedding.
    """

    name: str
    stack: str
    shape: tuple[int, int]
    num_shards: int
    shard_rows: int
    width: int
    row_offset: int
    rotation: int
    padded_rows: int

    def __post_init__(self) -> None:
        for field in ("num_shards", "shard_rows", "width", "row_offset", "rotation", "padded_rows"):
            object.__setattr__(self, field, self._int(field, getattr(self, field)))
        try:
            rows, dim = self.shape
        except (TypeError, ValueError):
            raise ValueError(f"{self._what}: shape must be (rows, dim), got {self.shape!r}.") from None
        object.__setattr__(self, "shape", (self._int("rows", rows), self._int("dim", dim)))
        self._check()

    @property
    def stack_shape(self) -> tuple[int, int]:
        """[S * R, W], that of the whole stack."""
        return self.num_shards * self.shard_rows, self.width

    def read_rows(self, stacked: Any, start: int, stop: int) -> np.ndarray:
        """The rows [start, stop) of the table, without padding.

        Args:
          stacked: [S * R, W], or the [S * R] of a slot with one value a row; sliced by rows.
          start: first row.
          stop: one past the last.

        Returns:
          [stop - start, D], or [stop - start], as `stacked`.

        Raises:
          ValueError: if `stacked` is of another shape, or the rows are not the table's.
        """
        columns = self._columns(stacked, start, stop)
        out = np.empty((stop - start, *columns), stacked.dtype)
        for rows, place in self._slices(start, stop):
            part = np.asarray(stacked[place])
            out[rows] = part[:, : self.shape[1]] if columns else part
        return out

    def write_rows(self, stacked: Any, start: int, rows: np.ndarray) -> None:
        """Puts `rows` into the stack as the table's rows from `start` on; padding is left as it is.

        Args:
          stacked: as `read_rows`, writable.
          start: first row.
          rows: [N, D], or [N] where `stacked` has one value a row; of the type of `stacked`.

        Raises:
          ValueError: as `read_rows`, or if `rows` is of another type or shape.
        """
        stop = start + rows.shape[0]
        columns = self._columns(stacked, start, stop)
        if rows.shape[1:] != columns or rows.dtype != stacked.dtype:
            raise ValueError(
                f"{self._what}: rows must be {stacked.dtype} [N{''.join(f', {n}' for n in columns)}], "
                f"got {rows.dtype} {list(rows.shape)}."
            )
        for part, place in self._slices(start, stop):
            if columns:
                stacked[place, : self.shape[1]] = rows[part]
            else:
                stacked[place] = rows[part]

    @property
    def _what(self) -> str:
        return f"Table {self.name!r} of stack {self.stack!r}"

    def _int(self, field: str, value: Any) -> int:
        try:
            return operator.index(value)
        except TypeError:
            raise ValueError(f"{self._what}: {field} must be an int, got {value!r}.") from None

    def _check(self) -> None:
        rows, dim = self.shape
        if min(rows, dim, self.num_shards, self.shard_rows) < 1:
            raise ValueError(
                f"{self._what}: sizes must be at least 1, got shape {self.shape}, num_shards "
                f"{self.num_shards}, shard_rows {self.shard_rows}."
            )
        if self.width < dim:
            raise ValueError(f"{self._what}: {dim} columns do not fit into a width of {self.width}.")
        if not 0 <= self.rotation < self.num_shards:
            raise ValueError(f"{self._what}: rotation must be in [0, {self.num_shards}), got {self.rotation}.")
        if self.padded_rows < rows or self.padded_rows % self.num_shards:
            raise ValueError(
                f"{self._what}: padded_rows must be a multiple of {self.num_shards} and at least {rows}, "
                f"got {self.padded_rows}."
            )
        last = self.row_offset + self.padded_rows // self.num_shards
        if self.row_offset < 0 or last > self.shard_rows:
            raise ValueError(
                f"{self._what}: rows [{self.row_offset}, {last}) of a shard are outside of its "
                f"{self.shard_rows} rows."
            )

    def _columns(self, stacked: Any, start: int, stop: int) -> tuple[int, ...]:
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"{self._what}: rows [{start}, {stop}) are outside of [0, {self.shape[0]}).")
        shape = tuple(stacked.shape)
        if shape == self.stack_shape:
            return (self.shape[1],)
        if shape == self.stack_shape[:1]:
            return ()
        raise ValueError(
            f"{self._what}: the stack must be {list(self.stack_shape)} or {list(self.stack_shape[:1])}, "
            f"got {list(shape)}."
        )

    def _slices(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """For each shard, which of the rows [start, stop) it has, and where."""
        for first in range(start, min(stop, start + self.num_shards)):
            count = -(-(stop - first) // self.num_shards)
            shard = (first + self.rotation) % self.num_shards
            place = shard * self.shard_rows + self.row_offset + first // self.num_shards
            yield slice(first - start, stop - start, self.num_shards), slice(place, place + count)


def check_stack(tables: Sequence[StackedTable]) -> None:
    """Raises ValueError if `tables` are not those of one stack, or two of them share a row."""
    if not tables:
        raise ValueError("a stack must have at least one table, got none.")
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise ValueError(f"Stack {tables[0].stack!r}: tables must have names of their own, got {names}.")
    for table in tables[1:]:
        theirs, ours = ((t.stack, t.num_shards, t.shard_rows, t.width) for t in (tables[0], table))
        if theirs != ours:
            raise ValueError(
                f"Tables {tables[0].name!r} and {table.name!r} are not of one stack: (stack, num_shards, "
                f"shard_rows, width) are {theirs} and {ours}."
            )
    for a, b in itertools.pairwise(sorted(tables, key=lambda t: t.row_offset)):
        if a.row_offset + a.padded_rows // a.num_shards > b.row_offset:
            raise ValueError(f"Stack {a.stack!r}: tables {a.name!r} and {b.name!r} share rows of a shard.")


def from_tensorflow(layout: Any) -> StackedTable:
    """Of a `SparseCoreTableLayout` of TensorFlow.

    Raises:
      ValueError: if it describes no table in a stack.
    """
    if len(layout.unsharded_shape) != 2 or len(layout.unsharded_padded_shape) != 2:
        raise ValueError(
            f"Table {layout.table_name!r}: unsharded_shape and unsharded_padded_shape must be (rows, dim), "
            f"got {list(layout.unsharded_shape)} and {list(layout.unsharded_padded_shape)}."
        )
    return StackedTable(
        name=layout.table_name,
        stack=layout.stacked_table_name,
        shape=(layout.unsharded_shape[0], layout.unsharded_shape[1]),
        num_shards=layout.num_sparse_cores,
        shard_rows=layout.total_rows_per_sparse_core_shard,
        width=layout.unsharded_padded_shape[1],
        row_offset=layout.sparse_core_shard_row_offset,
        rotation=layout.sparse_core_shard_rotation,
        padded_rows=layout.unsharded_padded_shape[0],
    )


def from_jax_tpu_embedding(stack: Any) -> tuple[StackedTable, ...]:
    """The tables of a `StackedTableSpecProto` of jax-tpu-embedding.

    Raises:
      ValueError: if they do not fit into the stack, or share rows.
    """
    if stack.num_sparsecores < 1 or stack.stack_vocab_size % stack.num_sparsecores:
        raise ValueError(
            f"Stack {stack.stack_name!r}: stack_vocab_size must be a multiple of num_sparsecores, got "
            f"{stack.stack_vocab_size} and {stack.num_sparsecores}."
        )
    tables = tuple(
        StackedTable(
            name=table.table_name,
            stack=stack.stack_name,
            shape=(table.vocab_size, table.embedding_dim),
            num_shards=stack.num_sparsecores,
            shard_rows=stack.stack_vocab_size // stack.num_sparsecores,
            width=stack.stack_embedding_dim,
            row_offset=table.row_offset_in_shard,
            rotation=table.shard_rotation,
            padded_rows=table.padded_vocab_size,
        )
        for table in stack.table_specs
    )
    check_stack(tables)
    return tables
