"""Reads the ids and weights of one feature that came as arrays: ragged, sparse or one id a row."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxembed.inputs import RaggedTensor, SparseTensor, as_input
from jaxembed.inputs.ids import check_unmasked

from . import checks
from .features import ServedFeature

_ARRAYS = np.ndarray | jax.Array


def as_bags(feature: ServedFeature, leaf: Any, weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The ids of a leaf in the order of rows, pruned and cut as the feature says.

    Returns:
      [N] integer ids, [B + 1] row splits from 0 to N, and [N] float32 weights or None.

    Raises:
      ValueError: if the leaf or its weights are of no kind that can be read, or an id does not fit 64 bits with a sign.
    """
    ids, splits, values = _bags(feature, leaf, weight)
    if ids.dtype == np.uint64:
        if ids.size and ids.max() >= np.uint64(2**63):
            checks.refuse(checks.bad_id([feature], ids, splits[None]))
        ids = ids.astype(np.int64)
    return ids, splits, values


def _bags(feature: ServedFeature, leaf: Any, weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    length = feature.config.max_sequence_length
    if weight is not None and length:
        raise checks.weights_on_sequence(feature)
    leaf, weight = _converted(feature, leaf), _converted(feature, weight)
    if isinstance(leaf, SparseTensor):
        return _sparse(feature, leaf, weight)
    if isinstance(leaf, RaggedTensor):
        ids, splits = _ragged(f"Feature {feature.path!r}", leaf)
    elif isinstance(leaf, list | tuple) and leaf and all(isinstance(row, _ARRAYS) for row in leaf):
        ids, splits = _rows(feature, leaf)
    else:
        ids, splits = _dense(feature, leaf)
        if weight is not None:
            raise checks.weights_on_dense(feature)
    ids = _integers(feature, ids)
    if length:
        ids, splits = _cut(ids, splits, length)
    if weight is None:
        return ids, splits, None
    values, weight_splits = _weights(feature, leaf, weight)
    if not np.array_equal(weight_splits, splits):
        raise checks.weight_lengths(feature, np.diff(splits).tolist(), np.diff(weight_splits).tolist())
    return ids, splits, values


def as_weights(
    features: Sequence[ServedFeature], rows: list[Any], weights: Sequence[Any], num_rows: int
) -> list[float]:
    """Weights of features that came as lists, flat and parallel to their ids; 1 where there are none.

    Args:
      features: the features that came as lists.
      rows: their rows, feature by feature.
      weights: their weights, lists of lists or None.
      num_rows: B.

    Raises:
      ValueError: if a feature takes no weights, or they are not parallel to its ids.
    """
    flat: list[float] = []
    for at, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        ids = rows[at * num_rows : (at + 1) * num_rows]
        if weight is None:
            flat += [1.0] * sum(map(len, ids))
            continue
        checks.takes_weights(feature)
        if isinstance(weight, RaggedTensor):
            weight = _checked(f"Weight for {feature.path!r}", weight).to_lists()
        if not isinstance(weight, list | tuple):
            raise checks.weight_kind(feature, weight, "a list of lists")
        for row in weight:
            if not isinstance(row, list | tuple) and not (isinstance(row, _ARRAYS) and row.ndim):
                raise checks.weight_kind(feature, row, "a list", "a row of ")
        lengths, expected = list(map(len, weight)), list(map(len, ids))
        if lengths != expected:
            raise checks.weight_lengths(feature, expected, lengths)
        for row in weight:
            flat += row if isinstance(row, list | tuple) else row.tolist()
    return flat


def own(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of one that somebody may write to: itself, or what it is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        if isinstance(base, memoryview):
            base = base.obj
            if not isinstance(base, bytes | np.ndarray):  # such as a bytearray, or a map of memory
                return array.copy()
        elif base.flags.writeable:
            return array.copy()
        else:
            base = base.base
    return array.copy() if isinstance(base, bytearray) else array


def _converted(feature: ServedFeature, value: Any) -> Any:
    """Arrays of pyarrow, scipy, TensorFlow and the like as ours; others are left to be refused."""
    if value is None or isinstance(value, RaggedTensor | SparseTensor | np.ndarray | jax.Array | list | tuple):
        return value
    if not type(value).__module__.startswith(("pyarrow", "scipy", "tensorflow", "jax")):
        return value
    try:
        return as_input(value)
    except ValueError as e:
        raise ValueError(f"Feature {feature.path!r}: {e}") from None


def _checked(what: str, leaf: Any) -> Any:
    """A RaggedTensor or SparseTensor of the host; one of a device, or that has changed, no constructor has checked."""
    try:
        if isinstance(leaf, RaggedTensor):
            return RaggedTensor(np.asarray(leaf.values), np.asarray(leaf.row_splits))
        return SparseTensor(np.asarray(leaf.indices), np.asarray(leaf.values), leaf.dense_shape)
    except ValueError as e:
        raise ValueError(f"{what}: {e}") from None


def _ragged(what: str, leaf: RaggedTensor) -> tuple[np.ndarray, np.ndarray]:
    leaf = _checked(what, leaf)
    splits, values = leaf.row_splits.astype(np.int64, copy=False), leaf.values
    return values[: splits[-1]], splits


def _rows(feature: ServedFeature, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    for at, row in enumerate(rows):
        if isinstance(row, np.ma.MaskedArray):
            check_unmasked(f"Feature {feature.path!r}, row {at}", row)
        if row.ndim != 1:
            raise ValueError(
                f"Feature {feature.path!r}, row {at} must be flat, got an array of shape {row.shape}."
            )
    full = [np.asarray(row) for row in rows if row.size]
    for row in full:
        _integers(feature, row)
    splits = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([row.size for row in rows], out=splits[1:])
    dtypes = {row.dtype for row in full}
    if len(dtypes) > 1 and np.dtype(np.uint64) in dtypes:  # numpy would make floats of them
        if any(row.dtype == np.uint64 and row.max() >= np.uint64(2**63) for row in full):
            wide = np.concatenate([row.astype(object) for row in full])
            checks.refuse(checks.bad_id([feature], wide, splits[None]))
        full = [row.astype(np.int64) for row in full]
    return np.concatenate(full) if full else np.zeros(0, np.int32), splits


def _dense(feature: ServedFeature, leaf: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(leaf, list | tuple):
        if not all(isinstance(id_, int | np.integer) and not isinstance(id_, bool) for id_ in leaf):
            raise checks.leaf_kind(feature, leaf)
        leaf = np.array(leaf, object).astype(np.int64) if _fits(leaf) else np.array(leaf, np.float64)
        if leaf.dtype == np.float64:  # beyond 64 bits: saturate, and be refused as out of range
            leaf = np.clip(leaf, -(2**62), 2**62).astype(np.int64)
    if not isinstance(leaf, np.ndarray | jax.Array):
        raise checks.leaf_kind(feature, leaf)
    if leaf.ndim != 1:
        raise checks.dense_rank(feature, leaf.shape)
    checks.takes_dense(feature)
    check_unmasked(f"Feature {feature.path!r}", leaf)
    return np.asarray(leaf), np.arange(leaf.shape[0] + 1)


def _fits(ids: Sequence[Any]) -> bool:
    return all(-(2**63) <= id_ < 2**63 for id_ in ids)


def _integers(feature: ServedFeature, ids: np.ndarray) -> np.ndarray:
    if ids.dtype.kind not in "iu":
        if ids.size == 0 and ids.dtype.kind == "f":  # np.array([]) is of type float64
            return ids.astype(np.int32)
        raise checks.id_dtype(feature, ids.dtype)
    return ids


def _weights(feature: ServedFeature, leaf: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    checks.takes_weights(feature)
    if isinstance(weight, list | tuple) and all(isinstance(row, list | tuple | _ARRAYS) for row in weight):
        try:
            with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
                weight = _listed_weights(weight)
        except (ValueError, OverflowError) as e:
            wrong = None
            if all(isinstance(row, list | tuple) or row.ndim for row in weight):
                splits = np.cumsum([0, *map(len, weight)])[None]
                wrong = checks.listed_weights([feature], [value for row in weight for value in row], splits)
            raise wrong or ValueError(f"Weight for {feature.path!r}: {e}") from None
    if not isinstance(weight, RaggedTensor):
        raise checks.weight_kind(feature, weight, "a RaggedTensor or a list of lists")
    values, splits = _ragged(f"Weight for {feature.path!r}", weight)
    return _floats(feature, values), splits


def _listed_weights(rows: Sequence[Any]) -> RaggedTensor:
    if all(isinstance(row, list | tuple) for row in rows):
        flat = list(itertools.chain.from_iterable(rows))
        kinds = set(map(type, flat))
        if kinds <= {int, float}:  # ints of any size, as JSON has them
            return RaggedTensor.from_row_lengths(np.array(flat, np.float32), list(map(len, rows)))
        if bool in kinds:  # numpy takes it for a number beside others
            raise ValueError("they must be numbers, got True or False.")
    return RaggedTensor.from_lists(rows, np.float32)


def _floats(feature: ServedFeature, weights: np.ndarray) -> np.ndarray:
    if weights.size and not jax.numpy.issubdtype(weights.dtype, np.floating):
        raise checks.weight_dtype(feature, weights.dtype)
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        return weights.astype(np.float32)


def _cut(ids: np.ndarray, splits: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(splits)
    if lengths.size == 0 or lengths.max() <= length:
        return ids, splits
    keep = np.arange(ids.size) - np.repeat(splits[:-1], lengths) < length
    return ids[keep], np.concatenate([[0], np.cumsum(np.minimum(lengths, length))])


def _sparse(
    feature: ServedFeature, leaf: SparseTensor, weight: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if len(leaf.dense_shape) != 2:
        raise checks.sparse_rank(feature, leaf.dense_shape)
    config, (num_rows, _) = feature.config, leaf.dense_shape
    leaf = _checked(f"Feature {feature.path!r}", leaf)
    indices, ids, values = leaf.indices, _integers(feature, leaf.values), None
    if weight is not None:
        checks.takes_weights(feature)
        if not isinstance(weight, SparseTensor):
            raise checks.weight_kind(feature, weight, "a SparseTensor, as its ids are")
        weight = _checked(f"Weight for {feature.path!r}", weight)
        if weight.dense_shape != leaf.dense_shape or not np.array_equal(weight.indices, indices):
            raise ValueError(
                f"Weight for {feature.path} must be parallel to its input: their indices differ; build the "
                "weights with the indices of the ids."
            )
        values = _floats(feature, weight.values)
    keep = indices[:, 0] < num_rows
    length = config.max_sequence_length
    if length:
        keep &= indices[:, 1] < length
    elif config.validate_weights_and_indices:
        keep &= ids >= 0
        if values is not None and config.table.combiner != "sum":
            # Weights that are no numbers stay, to be refused.
            keep &= ~(values <= 0)
    rows = indices[keep, 0]
    if length or (rows[1:] < rows[:-1]).any():
        order = np.lexsort((indices[keep, 1], rows)) if length else np.argsort(rows, kind="stable")
    else:
        order = slice(None)
    counts = np.bincount(rows, minlength=num_rows)
    splits = np.concatenate([[0], np.cumsum(counts)])
    ids, rows, columns = ids[keep][order], rows[order], indices[keep, 1][order]
    if length and not np.array_equal(columns, np.arange(rows.size) - np.repeat(splits[:-1], counts)):
        raise checks.sparse_sequence(feature)
    # Here, as what is pruned leaves no place in a row.
    bad = (ids < 0) | (ids >= config.table.vocabulary_size)
    bad &= np.arange(rows.size) - np.repeat(splits[:-1], counts) < checks.valency(feature)
    if bad.any():
        at = int(np.argmax(bad))
        raise checks.bad_sparse_id(feature, rows[at], columns[at], ids[at])
    if values is None:
        return ids, splits, None
    values = values[keep][order]
    bad = ~np.isfinite(values)
    if bad.any():
        at = int(np.argmax(bad))
        raise checks.bad_sparse_weight(feature, rows[at], columns[at], values[at])
    return ids, splits, values
