"""What is wrong with a request: finds the place and words the error. Only run once something is."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxembed.combiners import CustomCombiner

from .features import ServedFeature

_KINDS = "a list of lists of ints, a list of ints (one id a row), a RaggedTensor, a SparseTensor or an integer array [B]"


class BadIdError(ValueError):
    """An id outside [0, V) or that is no int; `feature` is the path of its feature."""

    def __init__(self, feature: ServedFeature, message: str):
        super().__init__(message)
        self.feature: str = feature.path


def leaf_kind(feature: ServedFeature, leaf: Any) -> ValueError:
    """For a leaf that is no ids at all."""
    if isinstance(leaf, list | tuple):
        at, odd = next(
            ((i, x) for i, x in enumerate(leaf) if isinstance(x, bool) or not isinstance(x, int | np.integer)),
            (0, leaf[0]),
        )
        return ValueError(f"Feature {feature.path!r}, row {at} must be {_ROW}, got {odd!r:.80}{_hint(odd)}.")
    return ValueError(f"Feature {feature.path!r} must be {_KINDS}, got {type(leaf).__name__}.")


_ROW = "a list of int ids or one int id, alike in all rows"


def as_rows(features: Sequence[ServedFeature], rows: list[Any], num_rows: int) -> list[Any]:
    """Rows of which some may be arrays among lists, as lists.

    Raises:
      ValueError: if one is neither.
    """
    for at, row in enumerate(rows):
        is_array = isinstance(row, np.ndarray | jax.Array)
        if not isinstance(row, list | tuple) and not (is_array and row.ndim == 1):
            raise ValueError(
                f"Feature {features[at // num_rows].path!r}, row {at % num_rows} must be {_ROW}, "
                f"got {row!r:.80}{_hint(row)}."
            )
    # Empty arrays are float64 unless told otherwise, and say nothing.
    return [row if isinstance(row, list | tuple) else row.tolist() for row in rows]


def cut_rows(feature: ServedFeature, rows: Sequence[Any], length: int) -> Sequence[Any]:
    """The first `length` ids of every row; rows that are no lists are left to be found later."""
    try:
        if max(map(len, rows), default=0) <= length:
            return rows
    except TypeError:
        pass
    return [row[:length] if isinstance(row, list | tuple) or np.ndim(row) == 1 else row for row in rows]


def row_counts(features: Sequence[ServedFeature], leaves: Sequence[Any]) -> ValueError:
    """For features that disagree on the number of rows."""
    counts = []
    for feature, leaf in zip(features, leaves, strict=True):
        if not (leaf.shape if hasattr(leaf, "shape") else hasattr(leaf, "__len__")):
            return ValueError(f"Feature {feature.path!r} must have a row for each example, got {leaf!r:.80}.")
        counts.append(leaf.shape[0] if hasattr(leaf, "shape") else len(leaf))
    other = next(i for i, count in enumerate(counts) if count != counts[0])
    return ValueError(
        f"All features must have the same number of rows: {features[0].path!r} has {counts[0]}, "
        f"{features[other].path!r} has {counts[other]}."
    )


def too_long(features: Sequence[ServedFeature], lengths: np.ndarray) -> ValueError:
    """For a row with more ids than the feature allows."""
    limits = np.array([[feature.max_ids] for feature in features])
    f, row = (int(i) for i in np.argwhere(lengths > limits)[0])
    return ValueError(
        f"Feature {features[f].path!r}, row {row} has {lengths[f, row]} ids; at most {features[f].max_ids} are "
        "served. Cut the row, or raise max_ids_per_row."
    )


def listed_ids(features: Sequence[ServedFeature], ids: Sequence[Any], splits: np.ndarray) -> ValueError | None:
    """For an entry of a list that is no int, or one that int32 cannot hold; None if those are dropped."""
    dropped = _dropped(features, splits)
    for at, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            feature, where = _locate(features, splits, at)
            return BadIdError(
                feature,
                f"Feature {feature.path!r}, {where}: ids must be ints, got {value!r:.80}{_hint(value)}.",
            )
        if not -(2**31) <= value < 2**31 and not dropped[at]:
            return _outside(*_locate(features, splits, at), value)
    return None


def bad_id(features: Sequence[ServedFeature], ids: np.ndarray, splits: np.ndarray) -> ValueError | None:
    """For an id outside [0, V); None if those are dropped.

    Args:
      features: in the order of `splits`.
      ids: [N] integers.
      splits: [F, B + 1]; bags beyond the last split are none.
    """
    sizes = np.array([feature.config.table.vocabulary_size for feature in features])
    limits = np.repeat(sizes, splits[:, -1] - splits[:, 0])
    bad = ((ids < 0) | (ids >= limits)) & ~_dropped(features, splits)
    at = int(np.argmax(bad))
    return _outside(*_locate(features, splits, at), ids[at]) if bad[at] else None


def bad_sparse_id(feature: ServedFeature, row: int, column: int, id_: Any) -> ValueError:
    """For an id outside [0, V) at a coordinate."""
    return _outside(feature, f"row {row}, position {column}", id_)


def listed_weights(
    features: Sequence[ServedFeature], weights: Sequence[Any], splits: np.ndarray
) -> ValueError | None:
    """For an entry of a list of weights that is no number, or one that float32 cannot hold; None if all are."""
    for at, value in enumerate(weights):
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not abs(value) <= float(np.finfo(np.float32).max):
            return _not_finite(*_locate(features, splits, at), f"{value!r:.80}")
    return None


def bad_weight(features: Sequence[ServedFeature], weights: np.ndarray, splits: np.ndarray) -> ValueError:
    """For a weight that is infinite or not a number."""
    at = int(np.argmin(np.isfinite(weights)))
    return _not_finite(*_locate(features, splits, at), weights[at])


def bad_sparse_weight(feature: ServedFeature, row: int, column: int, weight: Any) -> ValueError:
    """For a weight that is infinite or not a number, at a coordinate."""
    return _not_finite(feature, f"row {row}, position {column}", weight)


def takes_dense(feature: ServedFeature) -> None:
    """Raises ValueError unless one id a row may be given for `feature`, as a list or an array of ids."""
    if not feature.config.max_sequence_length and not isinstance(feature.config.table.combiner, str):
        raise ValueError(
            f"Feature {feature.path!r} has a combiner of its own, which dense ids (one a row) bypass; pass a list of "
            "lists or a RaggedTensor."
        )


def takes_weights(feature: ServedFeature) -> None:
    """Raises ValueError unless weights may be given for `feature`."""
    if feature.config.max_sequence_length:
        raise weights_on_sequence(feature)
    if not feature.weighted:
        raise ValueError(
            f"Weight specified for {feature.path!r}, which was not announced; pass weighted=[{feature.path!r}, ...] to "
            f"ServingFunction or export_model, or --weighted {feature.path} to `jaxembed serve`."
        )


def weights_on_sequence(feature: ServedFeature) -> ValueError:
    """For weights where nothing is combined."""
    return ValueError(f"Weight specified for {feature.path!r}, but this is a sequence feature.")


def weights_on_dense(feature: ServedFeature) -> ValueError:
    """For weights of single ids."""
    return ValueError(
        f"Weight specified for {feature.path!r}, but input is dense; pass a list of lists, a RaggedTensor or a "
        "SparseTensor of ids."
    )


def weight_kind(feature: ServedFeature, weight: Any, expected: str, part: str = "") -> ValueError:
    """For weights of another kind than the ids."""
    return ValueError(f"Weight for {feature.path!r}: {part}it must be {expected}, got {type(weight).__name__}.")


def weight_dtype(feature: ServedFeature, dtype: Any) -> ValueError:
    """For arrays of weights that are not floating point."""
    return ValueError(f"Weight for {feature.path!r} must be floating point, got {dtype}.")


def weight_lengths(feature: ServedFeature, ids: Sequence[int], weights: Sequence[int]) -> ValueError:
    """For weights that are not parallel to the ids."""
    if len(ids) != len(weights):
        return ValueError(
            f"Weight for {feature.path!r} must be parallel to its ids: got {len(weights)} rows for {len(ids)}."
        )
    row = next(i for i, (a, b) in enumerate(zip(ids, weights, strict=True)) if a != b)
    return ValueError(
        f"Weight for {feature.path!r} must be parallel to its ids: row {row} has {weights[row]} weights for "
        f"{ids[row]} ids."
    )


def id_dtype(feature: ServedFeature, dtype: Any) -> ValueError:
    """For arrays of ids that are not integers."""
    hint = "; look strings up in a vocabulary or hash them first" if dtype.kind in "USOT" else ""
    if dtype.kind == "O":
        hint = f"; pass ints as a list, as tolist() gives it{hint}"
    return ValueError(f"Feature {feature.path!r} must hold integer ids, got {dtype}{hint}.")


def dense_rank(feature: ServedFeature, shape: Sequence[int]) -> ValueError:
    """For arrays of ids of rank other than 1."""
    return ValueError(
        f"Feature {feature.path!r}: an array of ids must be [B], one id a row, got shape {list(shape)}; pass "
        "bags as a list of lists or RaggedTensor.from_dense."
    )


def sparse_rank(feature: ServedFeature, shape: Sequence[int]) -> ValueError:
    """For sparse ids of rank above 2."""
    return ValueError(
        f"Feature {feature.path!r}: a SparseTensor must be of rank 2 to be served, got dense_shape {list(shape)}."
    )


def sparse_sequence(feature: ServedFeature) -> ValueError:
    """For sparse sequences with holes."""
    return ValueError(
        f"Feature {feature.path!r}: a sparse sequence must fill columns 0, 1, ... of every row once to be "
        "served; pass a list of lists or a RaggedTensor."
    )


def refuse(error: ValueError | None) -> None:
    """Raises what was found, if anything: ids that a combiner drops may be any."""
    if error is not None:
        raise error from None


def valency(feature: ServedFeature) -> int:
    """How many ids of a bag its combiner takes: those beyond are dropped, whatever they are."""
    combiner, length = feature.config.table.combiner, feature.config.max_sequence_length
    return combiner.max_valency if isinstance(combiner, CustomCombiner) and not length else 2**31


def _dropped(features: Sequence[ServedFeature], splits: np.ndarray) -> np.ndarray:
    """Of the ids of all features, those that no combiner takes; the arguments are those of `bad_id`."""
    limits = np.repeat([valency(feature) for feature in features], splits[:, -1] - splits[:, 0])
    starts = np.repeat(splits[:, :-1].ravel(), np.diff(splits).ravel())
    return np.arange(starts.size) - starts >= limits


def _outside(feature: ServedFeature, where: str, value: Any) -> ValueError:
    table = feature.config.table
    return BadIdError(
        feature,
        f"Feature {feature.path!r}, {where}: id {value!s:.80} is outside of table {table.name!r} with "
        f"vocabulary_size {table.vocabulary_size}; ids must be in [0, {table.vocabulary_size}). "
        "Map or drop unknown ids first.",
    )


def _not_finite(feature: ServedFeature, where: str, value: Any) -> ValueError:
    return ValueError(f"Weight for {feature.path!r}, {where} must be a finite float32, got {value}.")


def _locate(features: Sequence[ServedFeature], splits: np.ndarray, at: int) -> tuple[ServedFeature, str]:
    f = int(np.searchsorted(splits[:, -1], at, side="right"))
    row = int(np.searchsorted(splits[f], at, side="right")) - 1
    return features[f], f"row {row}, position {at - int(splits[f, row])}"


def _hint(value: Any) -> str:
    return "; look strings up in a vocabulary or hash them first" if isinstance(value, str | bytes) else ""
