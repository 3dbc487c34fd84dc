"""What a format's reader gives and what its writer takes: tables and slots as blocks of rows.

A format is a module of this package with

    matches(path) -> bool                  whether `path` looks like one, from names and first bytes alone
    read(path, options) -> Source          opens it; nothing is read but what says which arrays there are
    check(out, contents)                   raises the ValueError of what the format cannot hold there; writes and reads nothing
    write(out, contents) -> list[str]      writes a new file or folder `out`, checked; what there is to say of it

and may have COMBINER, what its tables are combined by where no feature configuration says so (default "mean"),
COMBINER_WEIGHTS, whether it writes the weights of custom combiners (default True), KEYS, whether it writes tables by the names
of `Options.keys` (default False), LAYOUT, which of "read" and "write" take `Options.layout` (default none), and

    without_slots(out) -> str | None       why it writes no slots there (default None: it does)
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.digests import BlockDigester
from jaxembed.checkpoint.files import absolute_path
from jaxembed.checkpoint.stored import StoredArray

#: A table's name, and a slot's or None.
Place = tuple[str, str | None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a reader or writer may be told.

    Attributes:
      step: which step to read, of formats that have several.
      keys: where the arrays belong, by the names they have in the file that is read or written; None guesses.
      layout: a file that the format takes besides: of jax-tpu-embedding its EmbeddingSpecProto; to write keras-rs, a
        weights file of the model; to write stacks of TensorFlow, its SparseCoreTableLayouts, serialized or in a checkpoint.
    """

    step: int | None = None
    keys: Mapping[str, Place] | None = None
    layout: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What a reader found; nothing is read until asked.

    Attributes:
      tables: by name, [V, D].
      slots: by table and slot name, [V, D] or [V].
      step: number of training steps taken, 0 if the format does not say.
      feature_config: if the format has one, else None.
      metadata: JSON-able.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      optimizers: by table, what trained it, as `Optimizer.to_dict` gives it.
      notes: what the user should see, such as a mapping of keys that was guessed.
    """

    tables: dict[str, StoredArray]
    slots: dict[str, dict[str, StoredArray]] = dataclasses.field(default_factory=dict)
    step: int = 0
    feature_config: Any = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    combiner_weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class RowSource:
    """A `StoredArray.source` whose rows a function reads.

    Attributes:
      shape: of the whole.
      dtype: of the values.
      read_rows: called with (start, stop), 0 <= start <= stop <= rows; returns them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_rows: Callable[[int, int], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self.read_rows(start, stop)


@dataclasses.dataclass(frozen=True)
class ArrayReport:
    """One array that was converted.

    Attributes:
      table: its name.
      slot: of the slot, None for the table itself.
      shape: of the array.
      dtype: as written.
      num_bytes: of its values, as written.
      digest: of its values as written, by `layout.table_digest`, as inspection shows it; None in a dry run.
      max_error: largest absolute change of a value by the change of type, or by what training looked up; 0 without one.
    """

    table: str
    slot: str | None
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    digest: str | None
    max_error: float


class Stream:
    """One array on its way to a writer, which takes its rows from the first to the last, once.

    Args:
      table: its name.
      slot: of the slot, None for the table itself.
      array: to be read.
      dtype: to write it as.
    """

    def __init__(self, table: str, slot: str | None, array: StoredArray, dtype: np.dtype):
        self.table: str = table
        self.slot: str | None = slot
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._array = array
        self._advance: Callable[[int], Any] = lambda num_bytes: None
        self._digester, self._max_error = BlockDigester(self.shape, self.dtype), 0.0

    @property
    def num_bytes(self) -> int:
        """Of its values, as written."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def num_bytes_read(self) -> int:
        """Of its values, as they are."""
        return self._array.num_bytes

    def watch(self, advance: Callable[[int], Any]) -> None:
        """Has `advance` called with the number of bytes of each block that is read from now on."""
        self._advance = advance

    def stored(self) -> StoredArray:
        """The array as it is written, to be read in any order, and as often as one likes."""
        array = self._array

        def read_rows(start: int, stop: int) -> np.ndarray:
            return np.ascontiguousarray(array.read_rows(start, stop), self.dtype)

        return stored(array.what, self.shape, self.dtype, read_rows)

    def blocks(
        self, change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) in order, contiguous and of type `dtype`.

        Args:
          change: what becomes of the rows before they are written, of the same shape and type.
        """
        for start, rows in self._array.blocks():
            with np.errstate(over="ignore"):
                cast = np.ascontiguousarray(rows, self.dtype)
            if rows.dtype != self.dtype:
                self._refuse_overflow(start, rows, cast)
            cast = cast if change is None else np.ascontiguousarray(change(cast), self.dtype)
            if rows.dtype != self.dtype or change is not None:
                self._max_error = max(self._max_error, _max_error(rows, cast))
            self._digester.update(cast)
            self._advance(rows.nbytes)
            yield start, cast

    def _refuse_overflow(self, start: int, rows: np.ndarray, cast: np.ndarray) -> None:
        lost = np.isinf(cast.astype(np.float32)) & np.isfinite(rows)
        if lost.any():
            row, column = np.argwhere(lost)[0]
            slot = "" if self.slot is None else f", slot {self.slot}"
            raise ValueError(
                f"table {self.table!r}{slot} holds {rows[row, column]} at row {start + row}, column {column}, which is too "
                f"large for {self.dtype.name}; leave dtype (--dtype) out, or pass one of a larger range."
            )

    def report(self) -> ArrayReport:
        """Of what has been written; of a stream not yet read to its end, without a digest."""
        digests = self._digester.digests()
        digest = None if digests is None else layout.table_digest(digests.to_json())
        return ArrayReport(
            self.table, self.slot, self.shape, self.dtype.name, self.num_bytes, digest, self._max_error
        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a writer takes.

    Attributes:
      tables: in the order of their names.
      slots: in the order of their tables' names.
      step: number of training steps taken.
      feature_config: of all the tables.
      metadata: JSON-able.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      optimizers: by table, what trained it, as `Optimizer.to_dict` gives it.
      options: see there.
    """

    tables: tuple[Stream, ...]
    slots: tuple[Stream, ...]
    step: int
    feature_config: Any
    metadata: dict[str, Any]
    combiner_weights: dict[str, np.ndarray]
    optimizers: dict[str, dict[str, Any]]
    options: Options

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Tables, then slots."""
        return (*self.tables, *self.slots)


def stored(what: str, shape: Any, dtype: Any, read_rows: Callable[[int, int], np.ndarray]) -> StoredArray:
    """An array whose rows a function reads."""
    return StoredArray(what, RowSource(tuple(int(n) for n in shape), np.dtype(dtype), read_rows))


def path_of(path: str | pathlib.Path) -> pathlib.Path:
    """Absolute, with ~ for the user's home and without ".."."""
    return absolute_path(path)


def _max_error(rows: np.ndarray, cast: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(rows.astype(np.float64) - cast.astype(np.float64))
    return float(np.nanmax(gap, initial=0.0))
