"""Examples: a data set held as columns, from which any rows can be cut out as one Batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.inputs import RaggedTensor

from .batch import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class RaggedColumn:
    """One bag of ids per example: bag i is values[starts[i]:starts[i] + lengths[i]].

    Bags may overlap, so that the histories of a user's events share one copy of the events.

    Args:
      values: [N] integer ids.
      starts: [E] where each bag starts.
      lengths: [E] how many ids each bag holds.
      weights: [N] floating point weights parallel to `values`, or None.

    Raises:
      ValueError: if shapes do not agree or a bag leaves `values`.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.starts.ndim != 1 or self.starts.shape != self.lengths.shape:
            raise ValueError(
                f"RaggedColumn: values must be [N], starts and lengths [E], got {self.values.shape}, "
                f"{self.starts.shape} and {self.lengths.shape}."
            )
        if self.weights is not None and self.weights.shape != self.values.shape:
            raise ValueError(
                f"RaggedColumn: weights must be parallel to values, got {self.weights.shape} for "
                f"{self.values.shape}."
            )
        if self.starts.size:
            last = int((self.starts.astype(np.int64) + self.lengths).max())
            if self.starts.min() < 0 or self.lengths.min() < 0 or last > self.values.size:
                raise ValueError(
                    f"RaggedColumn: bags must lie in [0, {self.values.size}), got starts from "
                    f"{self.starts.min()}, lengths from {self.lengths.min()} and an end at {last}."
                )

    def __len__(self) -> int:
        return self.starts.shape[0]

    @property
    def max_length(self) -> int:
        """The length of the longest bag."""
        return int(self.lengths.max(initial=0))

    def select(self, rows: np.ndarray) -> "RaggedColumn":
        """The bags of `rows`, sharing `values`."""
        return RaggedColumn(self.values, self.starts[rows], self.lengths[rows], self.weights)

    def compact(self) -> "RaggedColumn":
        """The same bags with values of their own, in turn and without gaps."""
        at, starts = _positions(self.starts, self.lengths)
        weights = None if self.weights is None else self.weights[at]
        return RaggedColumn(self.values[at], starts, self.lengths, weights)

    @classmethod
    def concatenate(cls, parts: Sequence["RaggedColumn"]) -> "RaggedColumn":
        """The bags of all parts, in turn; parts that share `values` go on sharing them."""
        first = parts[0]
        if all(part.values is first.values and part.weights is first.weights for part in parts):
            values, weights, shifts = first.values, first.weights, [0] * len(parts)
        else:
            parts = [part.compact() for part in parts]
            values = _join([part.values for part in parts])
            weights = None
            if first.weights is not None:
                weights = np.concatenate([part.weights for part in parts if part.weights is not None])
            shifts = np.cumsum([0, *(part.values.size for part in parts[:-1])])
        starts = [part.starts + shift for part, shift in zip(parts, shifts, strict=True)]
        return cls(values, np.concatenate(starts), np.concatenate([part.lengths for part in parts]), weights)

    def take(
        self, rows: np.ndarray, capacity: int, padding_rows: int = 0, name: str = "ids"
    ) -> tuple[RaggedTensor, RaggedTensor | None]:
        """The bags of `rows`, then `padding_rows` empty ones, as ids and weights of [capacity] values.

        Raises:
          ValueError: if the bags hold more than `capacity` ids.
        """
        starts, lengths = self.starts[rows], self.lengths[rows]
        splits = np.zeros(lengths.size + padding_rows + 1, np.int32)
        np.cumsum(lengths, out=splits[1 : lengths.size + 1])
        splits[lengths.size + 1 :] = total = int(splits[lengths.size])
        if total > capacity:
            raise ValueError(
                f"feature {name!r}: a batch of {lengths.size} examples holds {total} ids, more than its "
                f"capacity of {capacity}; raise capacities[{name!r}] (batch size times the longest bag, "
                f"{lengths.size * self.max_length}, always suffices)."
            )
        at, _ = _positions(starts, lengths)
        values = _ids(self.values[at])
        ids = np.zeros(capacity, values.dtype)
        ids[:total] = values
        if self.weights is None:
            return RaggedTensor(ids, splits), None
        weights = np.zeros(capacity, np.float32)
        weights[:total] = self.weights[at]
        return RaggedTensor(ids, splits), RaggedTensor(weights, splits)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """E examples as columns of host arrays (memory-mapped ones too).

    Args:
      features: feature name to [E] integer ids or a RaggedColumn of E bags.
      dense: [E, K] float dense features.
      labels: [E] labels.
      block_splits: borders from 0 to E of blocks of neighbours on disk, in which shuffling stays; None to
        shuffle everything as one.

    Raises:
      ValueError: if the columns differ in length.
    """

    features: Mapping[str, np.ndarray | RaggedColumn]
    dense: np.ndarray
    labels: np.ndarray
    block_splits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", dict(self.features))
        lengths = {name: len(column) for name, column in self.features.items()}
        lengths |= {"dense": self.dense.shape[0], "labels": self.labels.shape[0]}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Examples: columns must be of one length, got {lengths}.")
        if self.dense.ndim != 2 or self.labels.ndim != 1:
            raise ValueError(
                f"Examples: dense must be [E, K] and labels [E], got {self.dense.shape} and {self.labels.shape}."
            )
        splits = self.block_splits
        if splits is not None and (splits[0] != 0 or splits[-1] != len(self) or np.any(np.diff(splits) <= 0)):
            raise ValueError(f"Examples: block_splits must rise from 0 to {len(self)}, got {splits[:10]}...")

    def __len__(self) -> int:
        return self.labels.shape[0]

    def select(self, rows: Any) -> "Examples":
        """The examples at `rows` (indices, a mask or a slice)."""
        features = {
            name: column.select(rows) if isinstance(column, RaggedColumn) else column[rows]
            for name, column in self.features.items()
        }
        return Examples(features, self.dense[rows], self.labels[rows])

    @classmethod
    def concatenate(cls, parts: Sequence["Examples"]) -> "Examples":
        """The examples of all parts, in turn."""
        features = {}
        for name in parts[0].features:
            columns = [part.features[name] for part in parts]
            bags = [column for column in columns if isinstance(column, RaggedColumn)]
            ids = [column for column in columns if not isinstance(column, RaggedColumn)]
            features[name] = RaggedColumn.concatenate(bags) if bags else _join(ids)
        return cls(
            features,
            np.concatenate([part.dense for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    @property
    def ragged_features(self) -> tuple[str, ...]:
        """The features that are bags."""
        return tuple(name for name, column in self.features.items() if isinstance(column, RaggedColumn))

    def capacities(self, batch_size: int) -> dict[str, int]:
        """Per ragged feature, the most ids that a batch can hold: batch size times the longest bag."""
        return {
            name: max(1, batch_size * column.max_length)
            for name, column in self.features.items()
            if isinstance(column, RaggedColumn)
        }

    def take(self, rows: np.ndarray, batch_size: int, capacities: Mapping[str, int]) -> Batch:
        """The examples at `rows` (at most `batch_size`), padded with empty examples, as one Batch.

        Args:
          rows: [b] indices, b at most `batch_size`.
          batch_size: B.
          capacities: per ragged feature, how many ids the batch has room for.

        Raises:
          ValueError: if there are more rows than B, or more ids than a capacity.
        """
        padding = batch_size - rows.size
        if padding < 0:
            raise ValueError(f"Examples.take: at most batch_size={batch_size} rows, got {rows.size}.")
        features, weights = {}, {}
        for name, column in self.features.items():
            if isinstance(column, RaggedColumn):
                features[name], weights[name] = column.take(rows, capacities[name], padding, name)
            else:
                features[name], weights[name] = _pad_ids(column, rows, padding), None
        return Batch(
            features=features,
            weights=weights,
            dense=_pad(self.dense[rows], padding, np.float32),
            labels=_pad(self.labels[rows], padding, np.float32),
            mask=_pad(np.ones(rows.size), padding, np.float32),
        )


def _positions(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of the bags lie, one bag after the other, and where each bag starts there."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total), ends - lengths


def _ids(ids: np.ndarray) -> np.ndarray:
    """As int32, or where a column is wider as it is: raw ids are not rows yet, and what is cut off would be another's."""
    return ids if ids.dtype in (np.int64, np.uint64, np.uint32) else ids.astype(np.int32)


def _pad_ids(column: np.ndarray, rows: np.ndarray, padding: int) -> np.ndarray:
    """Those of `rows`, and one of them again and again: one that vocabularies know, and of a row that moves anyhow where
    a batch is laid out without its mask.
    """
    ids = _ids(column[rows])
    if not padding:
        return ids
    others = ids if ids.size else _ids(column[:1])
    of_rows = others[others >= 0]
    return np.pad(ids, (0, padding), constant_values=of_rows.min() if of_rows.size else others.min(initial=0))


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One after the other; of signed and unsigned ones numpy would make floats."""
    unsigned = [part for part in parts if part.dtype == np.uint64]
    if not unsigned or not any(part.dtype.kind == "i" for part in parts):
        return np.concatenate(parts)
    if any(part.max(initial=0) >= 2**63 for part in unsigned):
        raise ValueError(
            "ids of one feature are int64 in some files and uint64 beyond 2**63 - 1 in others; store them as one type."
        )
    return np.concatenate([part.astype(np.int64) for part in parts])


def _pad(array: np.ndarray, rows: int, dtype: Any) -> np.ndarray:
    array = np.asarray(array, dtype)
    return np.pad(array, ((0, rows), *[(0, 0)] * (array.ndim - 1))) if rows else array
