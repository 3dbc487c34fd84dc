"""Ragged ids: bag b holds values[row_splits[b]:row_splits[b + 1]]."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from jaxembed import extension
from jaxembed.inputs.ids import check_unmasked, is_host, narrow_ids
from jaxembed.shapes import AnyIds, AnyPadded, AnyRowLengths, AnyRowSplits, AnyValues

_FEW = 64  # of so many row splits Python checks the order faster than numpy
_init_for: Any = getattr(extension.load("jaxembed_ragged"), "init_for", None)


class _Signature:
    """RaggedTensor.__signature__: Python 3.13 cannot tell the arguments of an __init__ that is native."""

    def __init__(self, signature: inspect.Signature):
        self.signature = signature

    def __get__(self, _: Any, owner: type) -> inspect.Signature | None:
        if owner.__init__ is not RaggedTensor.__init__:
            return None  # inspect goes on to look
        if owner.__new__ is RaggedTensor.__new__:
            return self.signature
        return inspect.signature(functools.partial(owner.__new__, owner))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class RaggedTensor:
    """B bags of ids (or of weights) of any length, as a pytree.

    Values beyond `row_splits[-1]` are padding: they are never read, so one compiled program serves
    every batch of at most N values. Host arrays stay on the host until a lookup needs them.

    Args:
      values: [N] ids (int32 or int64) or weights (floating point).
      row_splits: [B + 1] int32 or int64, not decreasing, from 0 to at most N.

    Raises:
      ValueError: if shapes, types or (for host arrays) the splits are not of the form above.

    References:
      `tf.RaggedTensor` with one ragged dimension.

    Examples:
      >>> RaggedTensor.from_lists([[0, 1], [], [3]]).shape
      (3, None)
    """

    values: AnyValues
    row_splits: AnyRowSplits

    def __init__(self, values: AnyValues, row_splits: AnyRowSplits):
        fields = self.__dict__
        fields["values"] = values
        fields["row_splits"] = row_splits
        # The usual case by itself: requests hold one of these for every feature. Native code does it where it was built.
        is_checked_here = type(self).__post_init__ is RaggedTensor.__post_init__
        on_host = type(values) is np.ndarray is type(row_splits) and values.ndim == 1 == row_splits.ndim
        if is_checked_here and on_host and row_splits.dtype.kind in "iu" and (size := len(row_splits)):
            if size <= _FEW:
                rows = row_splits.tolist()
                if rows[0] == 0 <= rows[-1] <= len(values) and (size <= 2 or rows == sorted(rows)):
                    return
            return check_row_splits(row_splits, len(values))
        self.__post_init__()

    def __post_init__(self) -> None:  # what the __init__ of a subclass's own fields calls, too
        for field in ("values", "row_splits"):
            value = getattr(self, field)
            check_unmasked(f"RaggedTensor: {field}", value)
            if isinstance(value, list | tuple):
                value = np.asarray(value)
                if value.size == 0:
                    value = value.astype(np.int32)
                object.__setattr__(self, field, value)
        if not hasattr(self.values, "shape") or not hasattr(self.row_splits, "shape"):
            raise ValueError(
                f"RaggedTensor needs arrays, got {type(self.values).__name__} and "
                f"{type(self.row_splits).__name__}; use RaggedTensor.from_lists for nested lists."
            )
        if self.values.ndim != 1:
            raise ValueError(f"RaggedTensor: values must be [N], got shape {tuple(self.values.shape)}.")
        if self.row_splits.ndim != 1 or self.row_splits.shape[0] < 1:
            raise ValueError(
                f"RaggedTensor: row_splits must be [B + 1], got shape {tuple(self.row_splits.shape)}."
            )
        if self.row_splits.dtype.kind not in "iu":  # timedelta64 is an np.integer
            raise ValueError(f"RaggedTensor: row_splits must be integers, got {self.row_splits.dtype}.")
        if is_host(self.row_splits):
            check_row_splits(self.row_splits, self.values.shape[0])

    @property
    def num_rows(self) -> int:
        """B, the number of bags."""
        return self.row_splits.shape[0] - 1

    @property
    def shape(self) -> tuple[int, None]:
        """(B, None), as `tf.RaggedTensor.shape`."""
        return (self.num_rows, None)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.values.dtype

    def pad(self, capacity: int) -> "RaggedTensor":
        """The same bags with `values` padded to [capacity]; the padding is never read.

        Raises:
          ValueError: if there are more than `capacity` values.
        """
        missing = capacity - self.values.shape[0]
        if missing < 0:
            raise ValueError(
                f"RaggedTensor.pad: capacity must be at least {self.values.shape[0]} values, got {capacity}."
            )
        values = np.pad(np.asarray(self.values), (0, missing))
        return RaggedTensor(values, self.row_splits)

    def to_lists(self) -> list[list[Any]]:
        """The bags as nested Python lists."""
        values, splits = np.asarray(self.values), np.asarray(self.row_splits)
        return [values[a:b].tolist() for a, b in itertools.pairwise(splits)]

    @classmethod
    def from_lists(cls, rows: Iterable[Any], dtype: DTypeLike | None = None) -> "RaggedTensor":
        """From a list of lists, one list a bag, of numbers or of strings for `jaxembed.preprocess`.

        Args:
          rows: of B bags, the list or the [L] array of each.
          dtype: of the values; default: that of numpy for ints, float32, object for strings.

        Raises:
          ValueError: if a row is not flat, entries are neither all numbers nor all strings, or `dtype` cannot hold them.
        """
        if not isinstance(rows, Iterable):
            raise ValueError(f"RaggedTensor.from_lists: rows must be a list of lists, got {rows!r}.")
        rows = list(rows)
        arrays = [np.asarray(row) for row in rows]
        for i, array in enumerate(arrays):
            if isinstance(rows[i], np.ma.MaskedArray):
                check_unmasked(f"RaggedTensor.from_lists: row {i}", rows[i])
            if array.ndim != 1:
                raise ValueError(f"RaggedTensor.from_lists: row {i} must be a flat list, got {rows[i]!r}.")
        values = _joined(rows, arrays)
        if dtype is not None:
            values = _as_type(values, np.dtype(dtype))
        elif values.dtype.kind == "f":
            values = values.astype(np.float32)
        return cls.from_row_lengths(values, [array.size for array in arrays])

    @classmethod
    def from_row_lengths(cls, values: AnyValues, row_lengths: AnyRowLengths) -> "RaggedTensor":
        """From [N] values and the [B] length of each bag."""
        lengths = np.asarray(row_lengths)
        if lengths.ndim != 1 or (lengths.size and (lengths.dtype.kind not in "iu" or lengths.min() < 0)):
            raise ValueError(
                f"from_row_lengths: row_lengths must be [B] ints of at least 0, got {row_lengths!r}."
            )
        num_values = np.shape(values)[0]
        splits = np.zeros(lengths.size + 1, np.int64)
        fits = not lengths.size or lengths.max() <= num_values  # the sum of longer ones may wrap to it
        if fits:
            np.cumsum(lengths, out=splits[1:])
        if not fits or splits[-1] != num_values:
            raise ValueError(
                f"from_row_lengths: row_lengths must add up to the number of values, got {sum(lengths.tolist())} for "
                f"{num_values}; for values that are padding give row_splits to RaggedTensor."
            )
        return cls(values, splits.astype(np.int32) if splits[-1] < 2**31 else splits)

    @classmethod
    def from_row_splits(cls, values: AnyValues, row_splits: AnyRowSplits) -> "RaggedTensor":
        """From [N] values and [B + 1] row_splits that end at N, which is not checked of splits that are on a device."""
        ragged = cls(values, row_splits)
        if is_host(ragged.row_splits) and ragged.row_splits[-1] != ragged.values.shape[0]:
            raise ValueError(
                f"from_row_splits: row_splits must end at the number of values, got {ragged.row_splits[-1]} for "
                f"{ragged.values.shape[0]}; for values that are padding give row_splits to RaggedTensor."
            )
        return ragged

    @classmethod
    def from_value_rowids(
        cls, values: AnyValues, value_rowids: AnyIds, nrows: int | None = None
    ) -> "RaggedTensor":
        """From [N] values and the [N] row of each, not decreasing; `nrows` is B (default: last row + 1)."""
        rowids = np.asarray(value_rowids)
        if rowids.ndim != 1 or (rowids.size and rowids.dtype.kind not in "iu"):
            raise ValueError(f"from_value_rowids: value_rowids must be [N] ints, got {value_rowids!r}.")
        if nrows is not None and nrows < 0:
            raise ValueError(f"from_value_rowids: nrows must be at least 0, got {nrows}.")
        if nrows is None:
            nrows = int(rowids[-1]) + 1 if rowids.size else 0
        if rowids.size and (np.any(rowids[1:] < rowids[:-1]) or rowids[0] < 0 or rowids[-1] >= nrows):
            raise ValueError(
                f"from_value_rowids: value_rowids must not decrease and lie in [0, {nrows}), "
                f"got {value_rowids!r}; sort the values by row first."
            )
        if rowids.size != np.shape(values)[0]:
            raise ValueError(
                f"from_value_rowids: values and value_rowids must be of one length, "
                f"got {np.shape(values)[0]} and {rowids.size}."
            )
        return cls.from_row_lengths(values, np.bincount(rowids.astype(np.int64), minlength=nrows))

    @classmethod
    def from_dense(cls, array: AnyPadded, padding: float = -1) -> "RaggedTensor":
        """From a [B, L] array in which every entry equal to `padding` is left out."""
        array = np.asarray(array)
        if array.ndim != 2:
            raise ValueError(f"RaggedTensor.from_dense: array must be [B, L], got shape {array.shape}.")
        keep = array != padding
        return cls.from_row_lengths(array[keep], keep.sum(axis=1))

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (narrow_ids(self.values), narrow_ids(self.row_splits)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> "RaggedTensor":
        # Transformations unflatten with placeholders, so nothing is checked here.
        ragged = object.__new__(cls)
        object.__setattr__(ragged, "values", children[0])
        object.__setattr__(ragged, "row_splits", children[1])
        return ragged


_init_in_python = RaggedTensor.__init__
if _init_for is not None:
    setattr(RaggedTensor, "__signature__", _Signature(inspect.signature(RaggedTensor)))  # noqa: B010
    RaggedTensor.__init__ = _init_for(RaggedTensor, _init_in_python)


def check_row_splits(row_splits: np.ndarray, num_values: int, what: str = "RaggedTensor") -> None:
    """Raises ValueError unless row_splits rises from 0 to at most `num_values`."""
    first, last = row_splits.item(0), row_splits.item(-1)
    # count_nonzero is faster than any().
    if first == 0 <= last <= num_values and not np.count_nonzero(row_splits[1:] < row_splits[:-1]):
        return
    if first != 0:
        raise ValueError(f"{what}: row_splits must start at 0, got {first}.")
    steps = row_splits[1:] < row_splits[:-1]
    if steps.any():
        at = int(np.argmax(steps))
        raise ValueError(
            f"{what}: row_splits must not decrease, got {row_splits[at]} then {row_splits[at + 1]} "
            f"at position {at + 1}."
        )
    raise ValueError(f"{what}: row_splits end at {last} but there are only {num_values} values.")


def _joined(rows: list[Any], arrays: list[np.ndarray]) -> np.ndarray:
    """The entries of all rows, int64 or uint64 where numpy would round integers to floats; strings as objects.

    Args:
      rows: lists or arrays.
      arrays: what numpy makes of each.
    """

    def entries():
        pairs = zip(rows, arrays, strict=True)
        return itertools.chain.from_iterable(
            row if isinstance(row, list | tuple) else array.tolist() for row, array in pairs
        )

    full = [array for array in arrays if array.size]
    # Before numpy makes them all as long as the longest.
    is_text = bool(full) and all(array.dtype.kind in "OUST" for array in full)
    if is_text and all(isinstance(entry, str | bytes) for entry in entries()):
        return np.array(list(entries()), object)
    values = np.concatenate(full) if full else np.zeros(0, np.int32)
    if values.dtype.kind in "fO" and all(isinstance(entry, int | np.integer) for entry in entries()):
        low, high = (int(edge(entries())) for edge in (min, max))
        if low < -(2**63) or high >= (2**63 if low < 0 else 2**64):
            raise ValueError(
                f"RaggedTensor.from_lists: rows must hold int64 or uint64 numbers, got {low} to {high}."
            )
        return np.array(list(entries()), np.int64 if high < 2**63 else np.uint64)
    if values.dtype.kind == "O":
        values = np.array(values.tolist())
    if values.dtype.kind not in "iufV":  # V: bfloat16
        raise ValueError(
            f"RaggedTensor.from_lists: rows must hold numbers, or strings alone, got {values.dtype}."
        )
    return values


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Refuses what a type of integers or strings cannot hold: an id that wraps or is cut is another one."""
    if values.dtype.kind == "O" and dtype.kind not in "OUST":
        raise ValueError(
            f"RaggedTensor.from_lists: rows must hold numbers for {dtype.name}, got strings; look them up in a "
            "vocabulary or hash them first."
        )
    if dtype.kind in "UST":
        cut = values.astype(dtype)
        changed = [value for value, held in zip(values, cut, strict=True) if _text(value) != _text(held)]
        if changed:
            raise ValueError(
                f"RaggedTensor.from_lists: rows must hold strings that {dtype} can hold whole, got {changed[0]!r:.80}; "
                "pass a longer dtype, or object."
            )
        return cut
    if dtype.kind not in "iu" or not values.size:
        return values.astype(dtype)
    limits, low, high = np.iinfo(dtype), values.min(), values.max()
    if values.dtype.kind in "iu":
        fits = low >= limits.min and high <= limits.max
    else:  # the largest integer itself may be none of their type
        fits = (
            bool((values == np.trunc(values)).all())
            and float(low) >= limits.min
            and float(high) < limits.max + 1
        )
    if not fits:
        raise ValueError(
            f"RaggedTensor.from_lists: rows must hold {dtype.name} numbers, got {values.dtype.name} from {low} to "
            f"{high}; pass another dtype."
        )
    return values.astype(dtype)


def _text(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
