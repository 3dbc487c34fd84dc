"""What the signatures of a SavedModel take: TensorFlow checks it, maps raw ids to rows, and hands rows to the lookup."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxembed import structure
from jaxembed.config import FeatureConfig
from jaxembed.convert.saved_model_ids import IdMapping, check_mapping
from jaxembed.features import flat_features
from jaxembed.inputs import RaggedTensor, SparseTensor

SPLITS, WEIGHTS, INDICES, SHAPE = "row_splits", "weights", "indices", "dense_shape"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Of inputs that a signature takes.

    Attributes:
      signature: its name.
      sparse: coordinates rather than row splits.
      weighted: with weights for the features that take them.
    """

    signature: str
    sparse: bool
    weighted: bool


KINDS = (
    Kind("serving_default", False, False),
    Kind("weighted", False, True),
    Kind("sparse", True, False),
    Kind("sparse_weighted", True, True),
)


def kinds_of(feature_config: Any) -> tuple[Kind, ...]:
    """The signatures that features of a configuration can have."""
    weighted = any(map(takes_weights, flat_features(feature_config).values()))
    return tuple(kind for kind in KINDS if weighted or not kind.weighted)


def takes_weights(feature: FeatureConfig) -> bool:
    """Whether its bags are combined, so that ids may have weights."""
    return feature.max_sequence_length == 0


def feature_names(feature_config: Any) -> dict[str, str]:
    """By path of a feature its name in the signatures.

    Raises:
      ValueError: if TensorFlow cannot map its ids, or its inputs would have the names of another's.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path, feature in flat_features(feature_config).items():
        if feature.preprocessing is not None:
            check_mapping(path, feature.preprocessing)
        name = plain(path) or "ids"
        if name.startswith("_"):
            raise ValueError(
                f"feature {path!r} would be the input {name!r} in a signature, where names start with a letter or digit; "
                "rename it."
            )
        for used in (name, *(f"{name}_{end}" for end in (SPLITS, WEIGHTS, INDICES, SHAPE))):
            if used in taken:
                raise ValueError(
                    f"features {taken[used]!r} and {path!r} would share the input {used!r} in a signature; rename one."
                )
            taken[used] = path
        names[path] = name
    return names


def plain(name: str) -> str:
    """As TensorFlow allows names."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


class Inputs:
    """The inputs of one signature.

    Args:
      feature_config: the feature configuration.
      kind: of the signature.
      dense: by name, the shape of one row of other inputs.
    """

    def __init__(self, feature_config: Any, kind: Kind, dense: Mapping[str, tuple[int, ...]]):
        self.kind: Kind = kind
        self._dense, self._config = dict(dense), feature_config
        self._features = flat_features(feature_config)
        self._names = feature_names(feature_config)
        self._mappings: dict[str, IdMapping] = {}

    @property
    def names(self) -> list[str]:
        """Of the inputs of features."""
        return [
            f"{name}_{end}" if end else name for path, name in self._names.items() for end in self._ends(path)
        ]

    def signature(self, tf: Any) -> dict[str, Any]:
        """A tf.TensorSpec by name of each input."""
        specs = {}
        for path, name in self._names.items():
            parts = {
                "": ([None], self._id_type(tf, path)),
                SPLITS: ([self._splits(path)], tf.int64),
                INDICES: ([None, 2], tf.int64),
                SHAPE: ([2], tf.int64),
                WEIGHTS: ([None], tf.float32),
            }
            for end in self._ends(path):
                full = f"{name}_{end}" if end else name
                specs[full] = tf.TensorSpec(*parts[end], full)
        return specs | self._floats(tf)

    def ragged_signature(self, tf: Any) -> dict[str, Any]:
        """As `signature`, with a tf.RaggedTensorSpec for each feature."""
        specs = {}
        for path, name in self._names.items():
            splits = self._splits(path)
            batch = None if splits is None else splits - 1
            specs[name] = tf.RaggedTensorSpec([batch, None], self._id_type(tf, path), 1, tf.int64)
        return specs | self._floats(tf)

    def flat(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of `ragged_signature` as those of `signature`."""
        flat = {name: found[name] for name in self._dense}
        for name in self._names.values():
            flat |= {name: found[name].values, f"{name}_{SPLITS}": found[name].row_splits}
        return flat

    def resources(self, tf: Any, scratch: pathlib.Path) -> list[Any]:
        """The vocabularies, which a SavedModel keeps as files of its own; written in `scratch` until it is saved."""
        for path, feature in self._features.items():
            if feature.preprocessing is not None and path not in self._mappings:
                self._mappings[path] = IdMapping(tf, path, feature.preprocessing, scratch)
        return [mapping.vocabulary for mapping in self._mappings.values() if mapping.vocabulary is not None]

    def preprocessor(self, tf: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """From the inputs of the signature to what `lookup_inputs` takes, checked."""

        def run(found: Mapping[str, Any]) -> dict[str, Any]:
            features = {name: self._feature(tf, path, name, found) for path, name in self._names.items()}
            arrays = {"features": features, "dense": {name: found[name] for name in self._dense}}
            if self.kind.sparse:
                arrays["batch"] = self._batch(tf, found)
            return arrays

        return tf.autograph.experimental.do_not_convert(run)

    def polymorphic_shapes(self) -> dict[str, Any]:
        """Those of what `lookup_inputs` takes, for jax2tf."""
        shapes: dict[str, Any] = {"features": {}, "dense": {name: "(b, ...)" for name in self._dense}}
        for i, (path, name) in enumerate(self._names.items()):
            splits = "(b + 1,)" if self._splits(path) is None else None
            parts = {"ids": f"(n{i},)", SPLITS: splits, INDICES: f"(n{i}, 2)", WEIGHTS: f"(n{i},)"}
            wanted = {"ids", *self._ends(path)} - {"", SHAPE}
            shapes["features"][name] = {part: shape for part, shape in parts.items() if part in wanted}
        return shapes | ({"batch": "(b,)"} if self.kind.sparse else {})

    def lookup_inputs(self, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """Inputs and weights of `serving_embedding_lookup`."""

        def pack(path: str, part: str) -> Any:
            given = arrays["features"][self._names[path]]
            if part not in given:
                return None
            if self.kind.sparse:
                return SparseTensor(given[INDICES], given[part], (arrays["batch"].shape[0], 1))
            return RaggedTensor(given[part], given[SPLITS])

        ids, weights = (
            structure.map_leaves(lambda path, _, part=part: pack(structure.join(path), part), self._config)
            for part in ("ids", WEIGHTS)
        )
        return ids, weights if self.kind.weighted else None

    def _ends(self, path: str) -> list[str]:
        weighted = self.kind.weighted and takes_weights(self._features[path])
        return ["", *([INDICES, SHAPE] if self.kind.sparse else [SPLITS]), *([WEIGHTS] if weighted else [])]

    def _splits(self, path: str) -> int | None:
        """How many row splits, where an output_shape says so."""
        shape = self._features[path].output_shape
        if shape is None or self.kind.sparse:
            return None
        return math.prod(shape) + 1

    def _id_type(self, tf: Any, path: str) -> Any:
        preprocessing = self._features[path].preprocessing
        return tf.string if preprocessing is not None and preprocessing.dtype == "string" else tf.int64

    def _floats(self, tf: Any) -> dict[str, Any]:
        return {name: tf.TensorSpec([None, *shape], tf.float32, name) for name, shape in self._dense.items()}

    def _batch(self, tf: Any, found: Mapping[str, Any]) -> Any:
        sizes = tf.stack([found[f"{name}_{SHAPE}"][0] for name in self._names.values()])
        message = "the first number of every dense_shape must be the batch size, got"
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sizes == sizes[0]), [message, sizes])]):
            return tf.zeros([tf.identity(sizes[0])], tf.int32)

    def _feature(self, tf: Any, path: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        parts = {end: found[f"{name}_{end}"] for end in self._ends(path) if end}
        ids, feature = found[name], self._features[path]
        checks = [_same_length(tf, path, ids, parts[WEIGHTS])] if WEIGHTS in parts else []
        layout = _check_sparse if self.kind.sparse else _check_ragged
        checks += layout(tf, path, ids, parts)
        with tf.control_dependencies(checks):
            live = (_live_sparse if self.kind.sparse else _live_ragged)(tf, feature, parts, tf.size(ids))
            ids = tf.identity(ids)
        if path in self._mappings:
            ids = self._mappings[path].rows(ids, live)
        if self.kind.sparse:
            live &= _not_pruned(tf, feature, ids, parts.get(WEIGHTS))
        size = feature.table.vocabulary_size
        message = f"feature {path!r} has an id outside of [0, {size})"
        bad = live & ((ids < 0) | (ids >= size))
        with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(bad), [message, ids])]):
            arrays = {"ids": tf.saturate_cast(ids, tf.int32)}
        kept = {part: value for part, value in parts.items() if part != SHAPE}
        return arrays | {
            part: value if part == WEIGHTS else tf.saturate_cast(value, tf.int32)
            for part, value in kept.items()
        }


def _same_length(tf: Any, path: str, ids: Any, weights: Any) -> Any:
    message = f"feature {path!r} must have a weight for each of its ids, got"
    return tf.debugging.Assert(
        tf.equal(tf.size(ids), tf.size(weights)), [message, tf.size(weights), tf.size(ids)]
    )


def _check_ragged(tf: Any, path: str, ids: Any, parts: Mapping[str, Any]) -> list[Any]:
    splits, count = parts[SPLITS], tf.size(ids, tf.int64)
    message = f"feature {path!r}: {SPLITS} must rise from 0 to at most the number of ids, got"
    rises = tf.reduce_all(splits[1:] >= splits[:-1])
    fits = tf.reduce_all(splits[:1] == 0) & tf.reduce_all(splits[-1:] <= count) & (tf.size(splits) > 0)
    return [tf.debugging.Assert(rises & fits, [message, splits, count])]


def _check_sparse(tf: Any, path: str, ids: Any, parts: Mapping[str, Any]) -> list[Any]:
    indices, shape = parts[INDICES], parts[SHAPE]
    message = f"feature {path!r}: {INDICES} must lie in {SHAPE}, one pair for each id, got"
    fits = tf.reduce_all((indices >= 0) & (indices < shape)) & tf.equal(tf.shape(indices)[0], tf.size(ids))
    return [tf.debugging.Assert(fits, [message, indices, shape])]


def _live_ragged(tf: Any, feature: FeatureConfig, parts: Mapping[str, Any], count: Any) -> Any:
    """Which entries are looked up: those before the last split, and within the length of a sequence."""
    splits, at = parts[SPLITS], tf.range(tf.cast(count, tf.int64))
    live = at < splits[-1]
    if feature.max_sequence_length and feature.output_shape is None:
        row = tf.maximum(tf.searchsorted(splits, at, side="right", out_type=tf.int64) - 1, 0)
        live &= at - tf.gather(splits, row) < feature.max_sequence_length
    return live


def _live_sparse(tf: Any, feature: FeatureConfig, parts: Mapping[str, Any], count: Any) -> Any:
    live = tf.ones([count], tf.bool)
    if feature.max_sequence_length and feature.output_shape is None:
        live &= parts[INDICES][:, 1] < feature.max_sequence_length
    return live


def _not_pruned(tf: Any, feature: FeatureConfig, ids: Any, weights: Any) -> Any:
    live = tf.ones(tf.shape(ids), tf.bool)
    is_sequence = feature.max_sequence_length > 0 and feature.output_shape is None
    if not feature.validate_weights_and_indices or is_sequence:
        return live
    live &= ids >= 0
    return live & (weights > 0) if weights is not None and feature.table.combiner != "sum" else live
