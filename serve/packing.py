"""Packs a request into one buffer of ids, one of row splits and one of weights.

The features lie one after the other in the buffer of ids; row f of the splits says where the bags of
feature f begin and end in it. Python lists are packed first and arrays after them, so that each kind
costs a few vectorized calls whatever the number of features.
"""

import dataclasses
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import checks
from .arrays import as_bags, as_weights
from .features import ServedFeature

_FLAT = frozenset((np.dtype(np.int32), np.dtype(np.int64)))
_UNSIGNED = {
    np.dtype(f"{order}{kind}{size}"): np.dtype(f"{order}u{size}")
    for order in "<>"
    for kind in "iu"
    for size in (1, 2, 4, 8)
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request, measured but not yet written.

    Attributes:
      rows: B.
      order: the feature of each row of `lengths`, in the order of packing.
      lengths: [F, B] int32, the number of ids of every bag.
      listed: how many of the features came as Python lists; they are the first of `order`.
      ids: the ids of these, flat.
      weights: as long as `ids`, or empty where none of these features is weighted.
      arrays: the ids of every other feature.
      array_weights: parallel to `arrays`, with None for all ones; or empty.
    """

    rows: int
    order: list[int]
    lengths: np.ndarray
    listed: int
    ids: list[int]
    weights: list[float]
    arrays: list[np.ndarray]
    array_weights: list[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A request, written.

    Attributes:
      rows: B.
      ids: int32, of which the splits say what is used.
      splits: [F, at least B + 1] int32, rows in the order of the feature configuration.
      weights: parallel to `ids`, or None.
    """

    rows: int
    ids: np.ndarray
    splits: np.ndarray
    weights: np.ndarray | None

    def counts(self) -> np.ndarray:
        """[F] ids of each feature."""
        return self.splits[:, -1] - self.splits[:, 0]


class Packer:
    """Turns the leaves of requests into buffers, and refuses what does not fit the features."""

    def __init__(self, features: Sequence[ServedFeature]):
        self.features: tuple[ServedFeature, ...] = tuple(features)
        sequences = [f.config.max_sequence_length for f in self.features]
        self._cut = sequences if any(sequences) else None
        self._custom = {i for i, f in enumerate(self.features) if not isinstance(f.config.table.combiner, str)}
        self._limits = np.array([[f.max_ids] for f in self.features], np.int32)
        self._limits_unsigned = self._limits.astype(np.uint32)
        self._longest = max((f.max_ids for f in self.features), default=0)
        self._sizes = np.array([f.config.table.vocabulary_size for f in self.features], np.uint32)
        self._identity = list(range(len(self.features)))
        self.weighted: bool = any(f.weighted for f in self.features)

    def measure(self, leaves: Sequence[Any], weights: Sequence[Any] | None) -> Request:
        """Sorts the leaves by kind and measures them.

        Raises:
          ValueError: if a leaf is of no known kind, numbers of rows differ, or a row is too long.
        """
        rows: list[Any] = []
        row_weights: list[Any] = []
        listed, arrayed, num_rows = [], [], -1
        for i, leaf in enumerate(leaves):
            if type(leaf) is not list and type(leaf) is not tuple:
                if not isinstance(leaf, list | tuple):
                    arrayed.append(i)
                    continue
                leaf = list(leaf)
            first = type(leaf[0]) if leaf else list
            if first is int:
                if i in self._custom:
                    checks.takes_dense(self.features[i])
                leaf = list(zip(leaf, strict=True))  # one id a row
                if weights is not None and weights[i] is not None:
                    raise checks.weights_on_dense(self.features[i])
            # Arrays among lists are packed as lists are.
            elif first is list or first is tuple or any(isinstance(row, list | tuple) for row in leaf):
                if self._cut is not None and self._cut[i]:
                    leaf = checks.cut_rows(self.features[i], leaf, self._cut[i])
            else:
                arrayed.append(i)
                continue
            if len(leaf) != num_rows:
                if num_rows >= 0:
                    raise checks.row_counts(self.features, leaves)
                num_rows = len(leaf)
            listed.append(i)
            rows += leaf
            if weights is not None:
                row_weights.append(weights[i])
        if not set(map(type, rows)) <= {list, tuple}:
            rows = checks.as_rows([self.features[i] for i in listed], rows, num_rows)
        lengths = np.array(list(map(len, rows)), np.int32)
        arrays = []
        array_weights: list[np.ndarray | None] = []
        if arrayed:
            splits = []
            for i in arrayed:
                leaf, weight = leaves[i], weights and weights[i]
                ids, split, weight = as_bags(self.features[i], leaf, weight)
                arrays.append(ids)
                splits.append(split)
                array_weights.append(weight)
                if len(split) - 1 != num_rows:
                    if num_rows >= 0:
                        raise checks.row_counts(self.features, leaves)
                    num_rows = len(split) - 1
            ends = np.concatenate(splits).reshape(len(arrayed), num_rows + 1)
            lengths = np.concatenate([lengths, (ends[:, 1:] - ends[:, :-1]).ravel()])
        order = self._identity if not arrayed or not listed else listed + arrayed
        lengths = lengths.reshape(len(order), num_rows)
        limits = self._limits if order is self._identity else self._limits[order]
        if np.count_nonzero(lengths > limits):
            raise checks.too_long([self.features[i] for i in order], lengths)
        ids = list(itertools.chain.from_iterable(rows))
        flat_weights = []
        if weights is not None and any(w is not None for w in row_weights):
            flat_weights = as_weights([self.features[i] for i in listed], rows, row_weights, num_rows)
        if not any(w is not None for w in array_weights):
            array_weights = []
        return Request(num_rows, order, lengths, len(listed), ids, flat_weights, arrays, array_weights)

    @property
    def takes_flat(self) -> bool:
        """Whether `pack_flat` may be used: no feature is a sequence, to be cut, or takes raw ids."""
        return self._cut is None and all(f.config.preprocessing is None for f in self.features)

    def pack_flat(self, ids: np.ndarray, lengths: np.ndarray) -> Packed:
        """Packs a request whose features lie one after the other already, without weights.

        Args:
          ids: [N] int32 or int64.
          lengths: [F, B] of every bag, in the order of the feature configuration; they add up to N.

        Raises:
          ValueError: if ids and lengths do not fit each other or the features, a row is too long, or an id not in
            [0, V).
        """
        unsigned = _UNSIGNED.get(lengths.dtype)
        if (
            ids.ndim != 1
            or ids.dtype not in _FLAT
            or lengths.ndim != 2
            or (unsigned is None and lengths.size)
            or len(lengths) != len(self.features)
        ):
            raise self._wrong_lengths(ids, lengths)
        # A negative length is a long one.
        if np.count_nonzero((lengths.view(unsigned) if unsigned else lengths) > self._limits_unsigned):
            if lengths.min() < 0:
                raise self._wrong_lengths(ids, lengths)
            raise checks.too_long(self.features, lengths)
        splits = np.zeros((len(self.features), lengths.shape[1] + 1), np.int32)
        splits[:, 1:] = lengths
        flat = splits.reshape(-1)
        np.add.accumulate(flat, out=flat)
        # Where their sum may be beyond 32 bits, it is taken again.
        total = flat[-1] if lengths.size * self._longest < 2**31 else lengths.sum(dtype=np.int64)
        if total != len(ids):
            raise self._wrong_lengths(ids, lengths)
        starts = splits[:, 0]
        filled = splits[:, -1] > starts
        if filled.any():
            used = ids.view(np.uint64 if ids.dtype == np.int64 else np.uint32)  # a negative id is a large one
            if np.count_nonzero(np.maximum.reduceat(used, starts[filled]) >= self._sizes[filled]):
                checks.refuse(checks.bad_id(self.features, ids, splits))
        weights = np.ones(len(ids), np.float32) if self.weighted else None
        return Packed(lengths.shape[1], ids.astype(np.int32, copy=False), splits, weights)

    def _wrong_lengths(self, ids: np.ndarray, lengths: np.ndarray) -> ValueError:
        return ValueError(
            f"ids must be [N] int32 or int64 and lengths [{len(self.features)}, B] ints of at least 0 that add up to N, "
            f"got ids {list(ids.shape)} {ids.dtype} and lengths {list(lengths.shape)} {lengths.dtype} of at least "
            f"{lengths.min(initial=0)} that add up to {lengths.sum()}; pass the length of every bag, feature by feature."
        )

    def write(self, request: Request, ids: np.ndarray, weights: np.ndarray | None, batch: int) -> Packed:
        """Writes a request to the front of `ids` and `weights`, with bags for `batch` rows.

        Raises:
          ValueError: naming feature, row and position, if an id is not an integer in [0, V) or a weight
            is not finite.
        """
        splits = np.zeros((len(self.features), batch + 1), np.int32)
        splits[:, 1 : request.rows + 1] = request.lengths
        flat = splits.reshape(-1)
        np.add.accumulate(flat, out=flat)
        self._write_ids(request, ids, splits)
        if weights is not None:
            self._write_weights(request, weights, splits)
        if request.order is not self._identity:
            splits = splits[np.argsort(request.order)]
        return Packed(request.rows, ids, splits, weights)

    def _write_ids(self, request: Request, ids: np.ndarray, splits: np.ndarray) -> None:
        total, listed = int(splits[-1, -1]), len(request.ids)
        if listed:
            try:
                struct.pack_into(f"{listed}i", ids.data, 0, *request.ids)
            except (struct.error, TypeError):
                checks.refuse(checks.listed_ids(self._order(request), request.ids, splits))
                ids[:listed] = [min(max(id_, -(2**31)), 2**31 - 1) for id_ in request.ids]
            # True and False pack as 1 and 0.
            low = (ids[:listed] <= 1).nonzero()[0].tolist()
            if low and any(type(request.ids[i]) is bool for i in low):
                checks.refuse(checks.listed_ids(self._order(request), request.ids, splits))
        if request.arrays:
            self._write_arrays(request, ids[listed:total], splits)
        if total:
            starts, ends = splits[:, 0], splits[:, -1]
            sizes = self._sizes if request.order is self._identity else self._sizes[request.order]
            used = ids[:total].view(np.uint32)  # a negative id is a large one
            filled = ends > starts
            if np.count_nonzero(filled) < len(filled):
                starts, sizes = starts[filled], sizes[filled]
            if np.count_nonzero(np.maximum.reduceat(used, starts) >= sizes):
                checks.refuse(checks.bad_id(self._order(request), ids[:total], splits))

    def _write_arrays(self, request: Request, out: np.ndarray, splits: np.ndarray) -> None:
        arrays = request.arrays
        if {array.dtype for array in arrays} == {np.dtype(np.int32)}:
            np.concatenate(arrays, out=out)
            return
        wide = np.concatenate(arrays, dtype=np.int64, casting="unsafe")
        if wide.size and (wide.min() < -(2**31) or wide.max() >= 2**31):
            features = self._order(request)[request.listed :]
            checks.refuse(checks.bad_id(features, wide, splits[request.listed :] - len(request.ids)))
        out[:] = wide

    def _write_weights(self, request: Request, weights: np.ndarray, splits: np.ndarray) -> None:
        total, listed = int(splits[-1, -1]), len(request.ids)
        if request.weights:
            # Any type with __float__ packs, so only the common ones are let through unseen.
            error = None
            if not set(map(type, request.weights)) <= {float, int}:
                error = checks.listed_weights(self._order(request), request.weights, splits)
            try:
                if error is None:
                    struct.pack_into(f"{listed}f", weights.data, 0, *request.weights)
            except (struct.error, OverflowError):
                error = checks.listed_weights(self._order(request), request.weights, splits)
            if error is not None:
                raise error
        else:
            weights[:listed] = 1
        if request.array_weights:
            at = listed
            for ids, values in zip(request.arrays, request.array_weights, strict=True):
                weights[at : at + len(ids)] = 1 if values is None else values
                at += len(ids)
        else:
            weights[listed:total] = 1
        if not np.isfinite(weights[:total]).all():
            listed_error = checks.listed_weights(self._order(request), request.weights, splits)
            raise listed_error or checks.bad_weight(self._order(request), weights[:total], splits)

    def _order(self, request: Request) -> list[ServedFeature]:
        return [self.features[i] for i in request.order]
