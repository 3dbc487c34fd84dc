"""A SavedModel that looks features up for TensorFlow Serving: ragged ids in, activations out.

The signature "serving_default" takes, for each feature, its ids [N] under the feature's name and int64 row
splits [B + 1] under `NAME_row_splits`, and gives its activations by the same name. `lookup`, for callers in
Python, takes a dict of RaggedTensors instead. With a model of dense inputs these are inputs of their names, and its
outputs are those of the signature. The tables and the model's parameters are variables, once on disk, and the lookup is the
StableHLO of `serving_embedding_lookup` in plain JAX.

References:
  `tf.saved_model.save`; jax2tf's native serialization (XlaCallModule).
"""

import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import structure
from jaxembed.backends import use_backend
from jaxembed.combiners import CustomCombiner
from jaxembed.convert.arrays import refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Stream, path_of
from jaxembed.convert.publishing import published
from jaxembed.features import feature_tables, flat_features, table_of
from jaxembed.inputs import RaggedTensor
from jaxembed.lookup import serving_embedding_lookup

SLOTS = False
SIDECAR = False
SIGNATURE = "serving_default"
SPLITS = "row_splits"


def matches(path: pathlib.Path) -> bool:
    """Never: it is written only."""
    del path
    return False


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes one; TensorFlow keeps variables in memory until they are saved, so all tables have to fit there."""
    needed("tensorflow", "saved-model")
    refuse_types(contents, "a SavedModel for TensorFlow Serving", ("bfloat16", "float16"))
    names = _names(contents.feature_config)
    _save(out, contents.feature_config, names, {s.table: _whole(s) for s in contents.tables}, None, None, {})
    return [
        f"feature {path!r} -> inputs {name}, {name}_{SPLITS}; output {name}" for path, name in names.items()
    ]


def export_saved_model(
    out: str | pathlib.Path,
    feature_config: Any,
    tables: Mapping[str, Any],
    *,
    model: Callable[[Any, Any, dict[str, Any]], Any] | None = None,
    params: Any = None,
    dense: Mapping[str, tuple[int, ...]] | None = None,
) -> pathlib.Path:
    """Writes lookups, and the dense model on top of them, as one SavedModel.

    Args:
      out: a new folder; TensorFlow Serving wants it named by a number.
      feature_config: the feature configuration.
      tables: by name, [V, D] float32.
      model: `model(params, activations, dense)` returns a pytree of arrays with leading dimension B; an output is
        named by its path, or "output" where it is the only one. None gives the activations.
      params: a pytree of arrays.
      dense: by name, the shape of one row of the float32 inputs that the model takes besides.

    Returns:
      The folder.

    Raises:
      ValueError: if `out` is there, a table does not fit, or a feature or name has no place in a SavedModel.
    """
    needed("tensorflow", "saved-model")
    place = path_of(out)
    if os.path.lexists(place):
        raise ValueError(f"{place} exists; pass another path or remove it.")
    names, dense = _names(feature_config), dict(dense or {})
    taken = {*names.values(), *(f"{name}_{SPLITS}" for name in names.values())}
    for name in dense:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in taken:
            raise ValueError(f"a dense input cannot be named {name!r} in a signature; rename it.")
    if dense and model is None:
        raise ValueError(f"dense inputs {sorted(dense)} need a model that takes them.")
    arrays = {}
    for name, config in feature_tables(feature_config).items():
        arrays[name] = np.asarray(table_of(tables, config))
        if arrays[name].dtype != np.float32:
            raise ValueError(f"table {name!r} must be float32 in a SavedModel, got {arrays[name].dtype.name}.")
    with published(place) as scratch:
        _save(scratch, feature_config, names, arrays, model, params, dense)
    return place


def _save(
    out: pathlib.Path,
    feature_config: Any,
    names: Mapping[str, str],
    tables: Mapping[str, np.ndarray],
    model: Callable[..., Any] | None,
    params: Any,
    dense: Mapping[str, tuple[int, ...]],
) -> None:
    tf: Any = needed("tensorflow", "saved-model")
    leaves, treedef = jax.tree.flatten(params)
    module = tf.Module()
    with tf.device("/cpu:0"):
        module.tables = [tf.Variable(rows, trainable=False, name=_plain(name)) for name, rows in tables.items()]
        module.params = [tf.Variable(np.asarray(leaf), trainable=False) for leaf in leaves]

    def function(rows: Any, params: Any, ids: Any, splits: Any, dense: Any) -> Any:
        inputs = {p: RaggedTensor(i, s) for p, i, s in zip(names, ids, splits, strict=True)}
        packed = structure.map_leaves(lambda path, _: inputs[structure.join(path)], feature_config)
        with use_backend("xla"):
            found = serving_embedding_lookup(packed, None, dict(zip(tables, rows, strict=True)), feature_config)
        if model is not None:
            return model(jax.tree.unflatten(treedef, params), found, dense)
        return {names[structure.join(path)]: leaf for path, leaf in structure.flatten(found)}

    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[
            None,
            None,
            [f"(n{i},)" for i in range(len(names))],
            ["(b + 1,)"] * len(names),
            {name: "(b, ...)" for name in dense},
        ],
        with_gradient=False,
        native_serialization_platforms=("cpu", "tpu", "cuda"),
    )
    _add_signatures(tf, module, converted, feature_config, names, dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf.saved_model.save(module, str(out), signatures={SIGNATURE: module.serve})


def _names(feature_config: Any) -> dict[str, str]:
    """By path of a feature its name in the signature."""
    names: dict[str, str] = {}
    for path, feature in flat_features(feature_config).items():
        if feature.preprocessing is not None:
            raise ValueError(f"feature {path!r} has preprocessing, which a SavedModel has no place for.")
        if isinstance(feature.table.combiner, CustomCombiner):
            raise ValueError(f"feature {path!r} has a CustomCombiner, which a SavedModel has no place for.")
        name = _plain(path) or "ids"
        if name in names.values() or any(f"{other}_{SPLITS}" == name for other in names.values()):
            raise ValueError(f"feature {path!r} has the name of another in a signature, {name!r}; rename one.")
        names[path] = name
    return names


def _whole(stream: Stream) -> np.ndarray:
    rows = np.empty(stream.shape, stream.dtype)
    for start, block in stream.blocks():
        rows[start : start + block.shape[0]] = block
    return rows


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def _add_signatures(
    tf: Any,
    module: Any,
    function: Callable[..., Any],
    feature_config: Any,
    names: Mapping[str, str],
    dense: Mapping[str, tuple[int, ...]],
) -> None:
    sizes = [feature.table.vocabulary_size for feature in flat_features(feature_config).values()]

    def run(ids: Sequence[Any], splits: Sequence[Any], others: dict[str, Any]) -> dict[str, Any]:
        checks = [
            tf.debugging.Assert(
                tf.reduce_all((values >= 0) & (values < size)),
                [f"feature {path!r} has an id outside of [0, {size})", values],
            )
            for path, values, size in zip(names, ids, sizes, strict=True)
        ]
        with tf.control_dependencies(checks):
            narrow = [[tf.saturate_cast(x, tf.int32) for x in parts] for parts in (ids, splits)]
        outputs = function(list(module.tables), list(module.params), *narrow, others)
        leaves, _ = jax.tree.flatten_with_path(outputs)
        return {
            _plain(jax.tree_util.keystr(path, simple=True, separator="_")) or "output": x for path, x in leaves
        }

    def serve(**inputs: Any) -> dict[str, Any]:
        parts = [[inputs[f"{name}{end}"] for name in names.values()] for end in ("", f"_{SPLITS}")]
        return run(*parts, {name: inputs[name] for name in dense})

    def lookup(inputs: Mapping[str, Any]) -> dict[str, Any]:
        ragged = [inputs[name] for name in names.values()]
        others = {name: inputs[name] for name in dense}
        return run([r.values for r in ragged], [r.row_splits for r in ragged], others)

    floats = {name: tf.TensorSpec([None, *shape], tf.float32, name) for name, shape in dense.items()}
    flat = {name: tf.TensorSpec([None], tf.int64, name) for name in names.values()}
    flat |= {f"{name}_{SPLITS}": tf.TensorSpec([None], tf.int64, f"{name}_{SPLITS}") for name in names.values()}
    module.serve = tf.function(serve, autograph=False).get_concrete_function(**flat, **floats)
    ragged = {name: tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64) for name in names.values()}
    module.lookup = tf.function(lookup, input_signature=[{**ragged, **floats}], autograph=False)
