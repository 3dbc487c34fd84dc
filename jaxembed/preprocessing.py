"""preprocess: raw ids to rows of the tables, on the host, as the feature configuration says.

Training (`ShardedEmbedding`) and serving (`ServingFunction`, `ServingModel`, `EmbeddingForServing`) call it
themselves and take raw ids. `serving_embedding_lookup` takes rows: its inputs may be traced.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import structure
from jaxembed.config import FeatureConfig
from jaxembed.features import flat_features
from jaxembed.inputs import RaggedTensor, SparseTensor
from jaxembed.inputs.convert import converted
from jaxembed.inputs.ids import check_unmasked, is_concrete
from jaxembed.raw_ids import BadIdError
from jaxembed.shapes import AnyPerExample, Inputs


def preprocess(inputs: Inputs, feature_config: Any, mask: AnyPerExample | None = None) -> Inputs:
    """The ids of every feature with `preprocessing` as rows of its table; others are left as they are.

    Args:
      inputs: a subset of `feature_config`; at each leaf with preprocessing a RaggedTensor, a SparseTensor or an
        array of raw ids, which may be strings, a list of lists of them, or a list of them.
      feature_config: a structure of FeatureConfig.
      mask: [B], 0 for rows of padding, as of `ShardedEmbedding.shard_batch`: their ids are not looked at, and become
        row 0.

    Returns:
      The same structure, with int32 rows; lists of lists become RaggedTensors.

    Raises:
      ValueError: naming feature, row and position of an id that cannot be mapped, or if ids are traced.

    Examples:
      >>> import jaxembed as je
      >>> user = je.TableConfig(vocabulary_size=100, dim=2, name="user")
      >>> features = {"user": je.FeatureConfig(user, preprocessing=je.HashBuckets(100, dtype="string"))}
      >>> preprocess({"user": ["ann", "bob", "ann"]}, features)["user"].tolist()
      [88, 97, 88]
    """
    features = flat_features(feature_config)
    if all(feature.preprocessing is None for feature in features.values()):
        return inputs
    return _walk(inputs, features, (), None if mask is None else np.asarray(mask) > 0)


def preprocess_leaf(path: str, feature: FeatureConfig, leaf: Any, mask: np.ndarray | None = None) -> Any:
    """The ids of one feature, whose `preprocessing` is not None, as rows; see `preprocess`."""
    if isinstance(leaf, list | tuple):
        return _from_lists(path, feature, leaf, mask)
    check_unmasked(f"Feature {path!r}", leaf)
    if not isinstance(leaf, RaggedTensor | SparseTensor | np.ndarray | jax.Array):
        try:
            leaf = converted(leaf)
        except ValueError as e:
            raise ValueError(f"Feature {path!r}: {e}") from None
    if not all(map(is_concrete, _arrays(leaf))):
        raise ValueError(
            f"Feature {path!r} has preprocessing, which runs on the host, but its ids are traced; call "
            "jaxembed.preprocess, or shard_batch, outside of jax.jit."
        )
    if isinstance(leaf, RaggedTensor):
        splits = np.asarray(leaf.row_splits)
        values = np.zeros(leaf.values.shape[0], np.int32)
        live = _live_bags(feature, mask, splits.size - 1)
        values[: splits[-1]] = _rows(path, feature, np.asarray(leaf.values)[: splits[-1]], splits, live)
        return RaggedTensor(values, leaf.row_splits)
    if isinstance(leaf, SparseTensor):
        indices = np.asarray(leaf.indices)
        used = np.flatnonzero(indices[:, 0] < leaf.dense_shape[0])
        values = np.zeros(indices.shape[0], np.int32)
        live = live_rows(mask, leaf.dense_shape[0], leaf.dense_shape[0])
        values[used] = _rows(path, feature, np.asarray(leaf.values)[used], indices[used], live)
        return SparseTensor(leaf.indices, values, leaf.dense_shape)
    num_rows = (leaf.shape or (1,))[0]
    live = live_rows(mask, num_rows, num_rows)
    return _rows(path, feature, np.asarray(leaf).reshape(-1), None, live).reshape(leaf.shape)


def live_rows(mask: np.ndarray | None, first_size: int, num_rows: int) -> np.ndarray | None:
    """Of a feature whose activations are [first_size, ...], which rows a mask leaves: bool [num_rows], None for all.

    All are left of a feature whose activations are not by example.
    """
    if mask is None or mask.all() or mask.size != first_size or num_rows % mask.size:
        return None
    return np.repeat(mask, num_rows // mask.size)


def _live_bags(feature: FeatureConfig, mask: np.ndarray | None, num_bags: int) -> np.ndarray | None:
    return live_rows(mask, feature.output_shape[0] if feature.output_shape else num_bags, num_bags)


def _walk(
    inputs: Any, features: Mapping[str, FeatureConfig], path: structure.Path, mask: np.ndarray | None
) -> Any:
    """Finds features by path, as `features.match` does: ids that it takes must not pass here unseen.

    A list at the path of a feature is its ids. What has no feature is left to be reported.
    """
    name = structure.join(path)
    if name in features and features[name].preprocessing is not None and not isinstance(inputs, Mapping):
        return None if inputs is None else preprocess_leaf(name, features[name], inputs, mask)
    children = structure.children(inputs)
    if children is None:
        return inputs
    return structure.rebuild(
        inputs, [_walk(child, features, (*path, str(key)), mask) for key, child in children], own_order=True
    )


def _from_lists(path: str, feature: FeatureConfig, rows: Sequence[Any], mask: np.ndarray | None) -> Any:
    if any(issubclass(kind, jax.Array) for kind in set(map(type, rows))):
        rows = [np.asarray(row) if isinstance(row, jax.Array) else row for row in rows]
    nested = [isinstance(row, list | tuple | np.ndarray) for row in rows]
    if not any(nested) and rows:
        return _rows(path, feature, list(rows), None, live_rows(mask, len(rows), len(rows)))
    if not all(nested) or any(np.ndim(row) != 1 for row in rows if isinstance(row, np.ndarray)):
        at = next((i for i, is_list in enumerate(nested) if not is_list), 0)
        raise ValueError(
            f"Feature {path!r}, row {at} must be a list of ids or one id, alike in all rows, got {rows[at]!r:.80}."
        )
    lists = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    splits = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(row) for row in lists], out=splits[1:])
    live = _live_bags(feature, mask, len(lists))
    return RaggedTensor(_rows(path, feature, list(itertools.chain.from_iterable(lists)), splits, live), splits)


def _rows(
    path: str, feature: FeatureConfig, ids: Any, places: np.ndarray | None, live: np.ndarray | None
) -> np.ndarray:
    """Rows of flat ids.

    Args:
      places: row splits [B + 1], coordinates [N, rank], or None for as many ids in each row.
      live: bool [B], the rows whose ids are looked at; those of others become 0. None for all.
    """
    preprocessing = feature.preprocessing
    assert preprocessing is not None
    count = len(ids)
    kept = None if live is None else np.flatnonzero(live.take(_rows_of(places, count, live.size), mode="clip"))
    if kept is not None:
        ids = ids[kept] if isinstance(ids, np.ndarray) else [ids[at] for at in kept]
    try:
        found = preprocessing.rows(ids)
    except BadIdError as e:
        at = e.at if kept is None else int(kept[e.at])
        raise ValueError(f"Feature {path!r}, {_place(at, places)}: {e}") from None
    if kept is None:
        return found
    rows = np.zeros(count, np.int32)
    rows[kept] = found
    return rows


def _rows_of(places: np.ndarray | None, num_ids: int, num_rows: int) -> np.ndarray:
    """Which row each id lies in, [N]; of malformed splits, which are refused later, any."""
    if places is None:
        return np.arange(num_ids) // max(num_ids // num_rows, 1)
    if places.ndim == 2:
        return places[:, 0]
    return np.searchsorted(places, np.arange(num_ids), side="right") - 1


def _place(at: int, places: np.ndarray | None) -> str:
    if places is None:
        return f"row {at}"
    if places.ndim == 2:
        return f"row {places[at, 0]}, position {places[at, -1]}"
    row = int(np.searchsorted(places, at, side="right")) - 1
    return f"row {row}, position {at - int(places[row])}"


def _arrays(leaf: Any) -> list[Any]:
    if isinstance(leaf, RaggedTensor):
        return [leaf.values, leaf.row_splits]
    return [leaf.values, leaf.indices] if isinstance(leaf, SparseTensor) else [leaf]
