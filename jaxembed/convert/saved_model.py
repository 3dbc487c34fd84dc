"""A SavedModel that looks features up for TensorFlow Serving: ragged ids in, activations out.

The signature "serving_default" takes, for each feature, its ids [N] under the feature's name and int64 row
splits [B + 1] under `NAME_row_splits`, and gives its activations by the same name. `lookup`, for callers in
Python, takes a dict of RaggedTensors instead. The tables are variables, once on disk, and the lookup is the
StableHLO of `serving_embedding_lookup` in plain JAX.

References:
  `tf.saved_model.save`; jax2tf's native serialization (XlaCallModule).
"""

import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed import structure
from jaxembed.backends import use_backend
from jaxembed.combiners import CustomCombiner
from jaxembed.convert.arrays import refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents
from jaxembed.features import flat_features
from jaxembed.inputs import RaggedTensor
from jaxembed.lookup import serving_embedding_lookup

SLOTS = False
SIGNATURE = "serving_default"
SPLITS = "row_splits"


def matches(path: pathlib.Path) -> bool:
    """Never: it is written only."""
    del path
    return False


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes one; TensorFlow keeps variables in memory until they are saved, so all tables have to fit there."""
    tf: Any = needed("tensorflow", "saved-model")
    refuse_types(contents, "a SavedModel for TensorFlow Serving", ("bfloat16", "float16"))
    names = _names(contents.feature_config)
    module = tf.Module()
    with tf.device("/cpu:0"):
        module.tables = [_variable(tf, stream) for stream in contents.tables]
    lookup = _lookup(contents.feature_config, list(names), [stream.table for stream in contents.tables])
    function = _as_tensorflow(lookup, list(names.values()))
    _add_signatures(tf, module, function, contents.feature_config, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf.saved_model.save(module, str(out), signatures={SIGNATURE: module.serve})
    return [
        f"feature {path!r} -> inputs {name}, {name}_{SPLITS}; output {name}" for path, name in names.items()
    ]


def _names(feature_config: Any) -> dict[str, str]:
    """By path of a feature its name in the signature."""
    names: dict[str, str] = {}
    for path, feature in flat_features(feature_config).items():
        if feature.preprocessing is not None:
            raise ValueError(f"feature {path!r} has preprocessing, which a SavedModel has no place for.")
        if isinstance(feature.table.combiner, CustomCombiner):
            raise ValueError(f"feature {path!r} has a CustomCombiner, which a SavedModel has no place for.")
        name = re.sub(r"[^A-Za-z0-9_]", "_", path) or "ids"
        if name in names.values() or any(f"{other}_{SPLITS}" == name for other in names.values()):
            raise ValueError(f"feature {path!r} has the name of another in a signature, {name!r}; rename one.")
        names[path] = name
    return names


def _variable(tf: Any, stream: Any) -> Any:
    rows = np.empty(stream.shape, stream.dtype)
    for start, block in stream.blocks():
        rows[start : start + block.shape[0]] = block
    return tf.Variable(rows, trainable=False, name=re.sub(r"[^A-Za-z0-9_]", "_", stream.table))


def _lookup(feature_config: Any, paths: Sequence[str], tables: Sequence[str]) -> Callable[..., list[Any]]:
    """Of arrays: tables in order, then ids and row splits of each feature."""

    def lookup(rows: Sequence[Any], ids: Sequence[Any], splits: Sequence[Any]) -> list[Any]:
        by_path = {path: RaggedTensor(i, s) for path, i, s in zip(paths, ids, splits, strict=True)}
        inputs = structure.map_leaves(lambda path, _: by_path[structure.join(path)], feature_config)
        with use_backend("xla"):
            found = serving_embedding_lookup(inputs, None, dict(zip(tables, rows, strict=True)), feature_config)
        by_name = {structure.join(path): leaf for path, leaf in structure.flatten(found)}
        return [by_name[path] for path in paths]

    return lookup


def _as_tensorflow(lookup: Callable[..., list[Any]], names: Sequence[str]) -> Callable[..., list[Any]]:
    from jax.experimental import jax2tf

    ids = [f"(n{i},)" for i in range(len(names))]
    return jax2tf.convert(
        lookup,
        polymorphic_shapes=[None, ids, ["(b + 1,)"] * len(names)],
        with_gradient=False,
        native_serialization_platforms=("cpu", "tpu", "cuda"),
    )


def _add_signatures(
    tf: Any, module: Any, function: Callable[..., list[Any]], feature_config: Any, names: Mapping[str, str]
) -> None:
    sizes = [feature.table.vocabulary_size for feature in flat_features(feature_config).values()]

    def run(ids: Sequence[Any], splits: Sequence[Any]) -> dict[str, Any]:
        checks = [
            tf.debugging.Assert(
                tf.reduce_all((values >= 0) & (values < size)),
                [f"feature {path!r} has an id outside of [0, {size})", values],
            )
            for path, values, size in zip(names, ids, sizes, strict=True)
        ]
        with tf.control_dependencies(checks):
            narrow = [[tf.saturate_cast(x, tf.int32) for x in parts] for parts in (ids, splits)]
        return dict(zip(names.values(), function(list(module.tables), *narrow), strict=True))

    def serve(**inputs: Any) -> dict[str, Any]:
        return run(
            [inputs[name] for name in names.values()], [inputs[f"{name}_{SPLITS}"] for name in names.values()]
        )

    def lookup(inputs: Mapping[str, Any]) -> dict[str, Any]:
        ragged = [inputs[name] for name in names.values()]
        return run([r.values for r in ragged], [r.row_splits for r in ragged])

    flat = {name: tf.TensorSpec([None], tf.int64, name) for name in names.values()}
    flat |= {f"{name}_{SPLITS}": tf.TensorSpec([None], tf.int64, f"{name}_{SPLITS}") for name in names.values()}
    module.serve = tf.function(serve, autograph=False).get_concrete_function(**flat)
    ragged = {name: tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64) for name in names.values()}
    module.lookup = tf.function(lookup, input_signature=[ragged], autograph=False)
