"""Parquet files as examples: loaded whole, or read row group by row group while training."""

import contextlib
import importlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .batch import Batch
from .examples import Examples, RaggedColumn


class ParquetExamples:
    """Examples in Parquet files, read when a batch asks for them.

    A feature is an integer column (one id an example) or a list of integers (a bag); weights are a list
    column of the same lengths. Row groups are the blocks of the shuffle: their order is shuffled, and
    the rows within each, so a batch opens one or two. The last few read are kept.

    Args:
      paths: files of one schema, in order.
      features: feature name to the name of its column.
      labels: name of the label column.
      dense: names of the dense columns, in order.
      weights: feature name to the name of the column of its weights.
      keep: how many row groups are kept in memory.

    Raises:
      ValueError: if a file is damaged, or a column is missing, of a type that does not fit or, where found when
        read, holds nulls, or labels or weights that are not finite.
      ImportError: if pyarrow is not installed.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        features: Mapping[str, str],
        labels: str,
        dense: Sequence[str] = (),
        weights: Mapping[str, str] | None = None,
        keep: int = 4,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 row group, got {keep}.")
        self._features, self._weights = dict(features), dict(weights or {})
        self._labels, self._dense, self._keep = labels, tuple(dense), keep
        self._columns = [labels, *dense, *self._features.values(), *self._weights.values()]
        self._ragged: tuple[str, ...] | None = None
        self._longest: dict[str, int] | None = None
        self._groups: list[tuple[str, int]] = []
        self._cache: OrderedDict[int, Examples] = OrderedDict()
        self._lock = threading.Lock()
        #: By path, its "rows" and "row groups".
        self.counts: dict[str, dict[str, int]] = {}
        sizes = []
        for path in paths:
            with _opened(path) as file:
                self._check(file.schema_arrow, path)
                counts = {"rows": file.metadata.num_rows, "row groups": file.num_row_groups}
                self.counts[os.fspath(path)] = counts
                for group in range(file.num_row_groups):
                    if file.metadata.row_group(group).num_rows:
                        self._groups.append((os.fspath(path), group))
                        sizes.append(file.metadata.row_group(group).num_rows)
        self.block_splits: tuple[int, ...] = tuple(np.cumsum([0, *sizes]).tolist())

    def __len__(self) -> int:
        return self.block_splits[-1]

    @property
    def ragged_features(self) -> tuple[str, ...]:
        """The features that are lists."""
        return self._ragged or ()

    def load(self) -> Examples:
        """All of it in memory, shuffled as one."""
        return Examples.concatenate([self._read(group) for group in range(len(self._groups))])

    def capacities(self, batch_size: int) -> dict[str, int]:
        """Per ragged feature, batch size times the longest bag, which takes reading all lists to find, once."""
        if self._longest is None:
            self._longest = self._find_longest()
        return {name: max(1, batch_size * length) for name, length in self._longest.items()}

    def _find_longest(self) -> dict[str, int]:
        longest = dict.fromkeys(self.ragged_features, 0)
        for path, group in self._groups if longest else ():
            with _opened(path) as file:
                table = file.read_row_group(group, columns=[self._features[name] for name in longest])
                for name in longest:
                    bags = bags_from_arrow(
                        _column(table, self._features[name]), f"the lists of feature {name!r}"
                    )
                    longest[name] = max(longest[name], bags.max_length)
        return longest

    def take(self, rows: np.ndarray, batch_size: int, capacities: Mapping[str, int]) -> Batch:
        """As `Examples.take`."""
        groups = np.searchsorted(np.asarray(self.block_splits), rows, side="right") - 1
        used = np.unique(groups)
        parts = [self._group(int(g)).select(rows[groups == g] - self.block_splits[g]) for g in used]
        if not parts:
            return self._group(0).take(rows, batch_size, capacities)
        together = Examples.concatenate(parts)
        back = np.empty(rows.size, np.int64)
        back[np.argsort(groups, kind="stable")] = np.arange(rows.size)
        return together.take(back, batch_size, capacities)

    def _group(self, group: int) -> Examples:
        with self._lock:
            if group not in self._cache:
                self._cache[group] = self._read(group)
                while len(self._cache) > self._keep:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _read(self, group: int) -> Examples:
        path, index = self._groups[group]
        with _opened(path) as file:
            table = file.read_row_group(index, columns=list(dict.fromkeys(self._columns)))
            expected = self.block_splits[group + 1] - self.block_splits[group]
            if table.num_rows != expected:
                raise ValueError(
                    f"row group {index} had {expected} rows when the file was opened first, now {table.num_rows}; write "
                    "new data to a new file."
                )
            features = {}
            for name, column in self._features.items():
                ids = _column(table, column)
                if name in self.ragged_features:
                    weights = self._weights.get(name)
                    features[name] = _bags(ids, None if weights is None else _column(table, weights), name)
                else:
                    features[name] = _numbers(ids, f"column {column!r} of feature {name!r}")
            dense = [_numbers(_column(table, name), f"column {name!r}") for name in self._dense]
            labels = _finite(
                _numbers(_column(table, self._labels), f"labels {self._labels!r}"), f"labels {self._labels!r}"
            )
        stacked = np.stack(dense, axis=1) if dense else np.zeros((table.num_rows, 0))
        return Examples(features, stacked.astype(np.float32), labels.astype(np.float32))

    def _check(self, schema: Any, path: str | os.PathLike[str]) -> None:
        types = _pyarrow("types")

        def kind(column):
            if column not in schema.names:
                raise ValueError(f"{path} has no column {column!r}; it has {schema.names}.")
            found = schema.field(column).type
            ragged = types.is_list(found) or types.is_large_list(found)
            return ragged, found.value_type if ragged else found

        ragged = []
        for name, column in self._features.items():
            is_list, value = kind(column)
            if not types.is_integer(value):
                raise ValueError(
                    f"{path}: column {column!r} of feature {name!r} must hold integers or lists of them, got "
                    f"{schema.field(column).type}; look strings up in a vocabulary or hash them first."
                )
            ragged += [name] * is_list
        for name, column in self._weights.items():
            is_list, value = kind(column)
            if name not in ragged or not is_list or not types.is_floating(value):
                raise ValueError(
                    f"{path}: weights {column!r} of feature {name!r} must be lists of floating point numbers for "
                    f"a feature of lists, got {schema.field(column).type}."
                )
        for column in (self._labels, *self._dense):
            is_list, value = kind(column)
            if is_list or not (types.is_integer(value) or types.is_floating(value) or types.is_boolean(value)):
                raise ValueError(
                    f"{path}: column {column!r} must hold numbers, got {schema.field(column).type}."
                )
        if self._ragged is not None and self._ragged != tuple(ragged):
            raise ValueError(f"{path}: {ragged} are lists, but {list(self._ragged)} in the files before.")
        self._ragged = tuple(ragged)


def bags_from_arrow(array: Any, name: str = "a list") -> RaggedColumn:
    """A pyarrow array of lists of numbers as bags, without a copy of the numbers; a null list is empty.

    Args:
      array: of lists.
      name: of the array, for errors.

    Raises:
      ValueError: if the array does not hold lists, or a list holds a null.
    """
    types = _pyarrow("types")
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        raise ValueError(f"bags_from_arrow: array must hold lists, got {array.type}.")
    offsets = array.offsets.to_numpy(zero_copy_only=True)
    lengths = np.diff(offsets)
    if array.null_count:
        lengths = np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    return RaggedColumn(_numbers(array.values, name), offsets[:-1], lengths)


def _bags(ids: Any, weights: Any, name: str) -> RaggedColumn:
    bags = bags_from_arrow(ids, f"the lists of feature {name!r}")
    if weights is None:
        return bags
    found = bags_from_arrow(weights, f"the weights of feature {name!r}")
    _finite(found.values, f"the weights of feature {name!r}")
    if not np.array_equal(found.lengths, bags.lengths):
        at = int(np.argmax(found.lengths != bags.lengths))
        raise ValueError(
            f"feature {name!r}: weights must be parallel to ids, got {found.lengths[at]} weights for "
            f"{bags.lengths[at]} ids in row {at}."
        )
    if not np.array_equal(found.starts, bags.starts):
        bags, found = bags.compact(), found.compact()
    return RaggedColumn(bags.values, bags.starts, bags.lengths, found.values)


def _numbers(array: Any, name: str) -> np.ndarray:
    if array.null_count:
        raise ValueError(f"{name} must hold no nulls, got {array.null_count}; fill them before training.")
    return array.to_numpy(zero_copy_only=array.type != "bool")


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        found = values[~np.isfinite(values)]
        raise ValueError(f"{what} must be finite, got {found[0]} and {found.size - 1} more that are not.")
    return values


def _column(table: Any, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file, not mapped: one that shrinks while it is read would end the process with SIGBUS. Errors name it."""
    parquet, arrow_error = _pyarrow("parquet"), _pyarrow("lib").ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (arrow_error, OSError, KeyError) as e:
        # Those of the system, which have a number, name the file themselves.
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise ValueError(f"{os.fspath(path)} is no whole Parquet file: {e}") from e
    except ValueError as e:
        where = os.fspath(path)
        if where in str(e):
            raise
        raise ValueError(f"{where}: {e}") from e


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise ImportError("Parquet files need pyarrow; pip install pyarrow.") from None
