"""A SavedModel that looks features up for TensorFlow Serving: ragged or sparse ids in, activations out.

Each feature has the inputs of its name in the signatures that it fits:

| signature | inputs of a feature NAME |
|---|---|
| "serving_default" | ids [N] NAME, int64 row splits [B + 1] NAME_row_splits |
| "weighted" | those, and float32 [N] NAME_weights where the feature takes weights |
| "sparse" | ids [N] NAME, int64 [N, 2] NAME_indices, int64 [2] NAME_dense_shape |
| "sparse_weighted" | those, and float32 [N] NAME_weights where the feature takes weights |

Ids are int64 rows, or what the feature's preprocessing maps to rows, which the SavedModel does itself. Outputs are named as
the features. `lookup`, for callers in Python, takes a dict of RaggedTensors instead. With a model of dense inputs these
are inputs of their names, and its outputs are those of the signature. The tables and the model's parameters are variables,
once on disk, and the lookup is the StableHLO of `serving_embedding_lookup` in plain JAX, exported by orbax-export.

The feature configuration is beside them, `assets.extra/feature_config.json`, where TensorFlow leaves files alone: with it
the tables are read back, as they are looked up. Of other SavedModels, the variables that `Options.keys` names.

References:
  `orbax.export.ExportManager`, `orbax.export.JaxModule`; `tf.saved_model.save`.
"""

import dataclasses
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import structure
from jaxembed.backends import use_backend
from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import read_regular, write_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.stored_quantized import StoredQuantized
from jaxembed.config import TableConfig
from jaxembed.convert.arrays import bits, refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Source, path_of
from jaxembed.convert.keys import SHOWN, is_table, own_key, own_place, place_arrays
from jaxembed.convert.mapped import mapped_rows
from jaxembed.convert.publishing import check_new, published
from jaxembed.convert.saved_model_inputs import SPLITS, Inputs, feature_names, kinds_of, plain
from jaxembed.convert.sidecar import MAX_SIDECAR, SIDECAR, make_sidecar, read_sidecar
from jaxembed.convert.tensorflow_tensors import Tensors
from jaxembed.dense_shapes import dense_shapes
from jaxembed.features import feature_tables, flat_features, table_of
from jaxembed.id_mapping import VocabularyFile
from jaxembed.lookup import serving_embedding_lookup
from jaxembed.memory import aligned_empty
from jaxembed.quantization import QuantizedTable, simulate_on_host
from jaxembed.serialization import strict_json

DTYPES = ("float32", "bfloat16", "float16")
#: The programs run on any of these.
PLATFORMS = ("cpu", "tpu", "cuda")
EXTRA, VARIABLE = "assets.extra", "tf_var_leaves/{}/.ATTRIBUTES/VARIABLE_VALUE"


def matches(path: pathlib.Path) -> bool:
    """Whether it is a SavedModel's folder."""
    return (path / "saved_model.pb").is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens its variables, mapped and verified when the first of their rows is asked for; keys go before what it says itself."""
    if not matches(path):
        raise ValueError(f"{path} is no SavedModel: it has no saved_model.pb.")
    tensors, sidecar = Tensors(path / "variables" / "variables"), path / EXTRA / SIDECAR
    arrays = {key: tensors.stored(key) for key in tensors.shapes if tensors.is_number(key)}
    known: dict[str, Any] = {}
    if sidecar.exists() and options.keys is None:
        content = read_regular(sidecar, MAX_SIDECAR)
        known = read_sidecar(sidecar, content)
        for table, key in _keys(sidecar, content).items():
            if key in arrays:
                arrays[own_key((table, None))] = arrays.pop(key)
    elif options.keys is None:
        found = [
            f"{key} {array.dtype.name}{list(array.shape)}" for key, array in arrays.items() if is_table(array)
        ]
        raise ValueError(
            f"{path} is a SavedModel without {EXTRA}/{SIDECAR}, which jaxembed puts into its own and which says what the tables "
            "are. Its variables can be read if keys (--keys) say which table each of them is; those that may be one: "
            f"{', '.join(found[:SHOWN]) or 'none'}{f' and {len(found) - SHOWN} more' if found[SHOWN:] else ''}."
        )
    tables, slots, notes = place_arrays(path, arrays, options, lambda key, _: own_place(key))
    return Source(tables, slots, notes=notes, **known)


def without_slots(out: pathlib.Path) -> str:
    """A SavedModel looks features up."""
    del out
    return "which saved-model has no place for"


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that TensorFlow shares with JAX; of features, those whose names and ids a signature can have."""
    del out
    needed("tensorflow", "saved-model")
    needed("orbax.export", "saved-model")
    refuse_types(contents, "a SavedModel", DTYPES)
    feature_names(contents.feature_config)
    for feature in flat_features(contents.feature_config).values():
        if isinstance(feature.preprocessing, VocabularyFile):
            feature.preprocessing.load()


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes one; tables with a quantization_config as training looked them up. TensorFlow saves them from mapped files."""
    config = contents.feature_config
    names, configs = feature_names(config), feature_tables(config)
    tables = {}
    for i, stream in enumerate(contents.tables):
        rows, file = stream.blocks(_as_trained(configs[stream.table])), out.parent / f"rows-{i}"
        tables[stream.table] = mapped_rows(file, stream, rows, bits(stream.dtype)).view(stream.dtype)
    more = {"step": contents.step, "metadata": contents.metadata, "optimizers": contents.optimizers}
    notes = _save(out, config, tables, contents.combiner_weights, None, None, {}, more)
    notes += [
        f"table {name!r} as training looked it up, quantized to {table.quantization_config.num_buckets} buckets"
        for name, table in configs.items()
        if table.quantization_config is not None
    ]
    notes += [
        f"feature {path!r} -> inputs {name}, {name}_{SPLITS}; output {name}" for path, name in names.items()
    ]
    notes += [
        f"feature {path!r} takes ragged batches of {math.prod(feature.output_shape)} bags, combined to its output_shape "
        f"{list(feature.output_shape)}; smaller ones, a sequence a bag, have no place in a SavedModel"
        for path, feature in flat_features(config).items()
        if feature.output_shape is not None
    ]
    return [*notes, f"signatures: {', '.join(kind.signature for kind in kinds_of(config))}"]


def export_saved_model(
    out: str | pathlib.Path,
    feature_config: Any,
    tables: Mapping[str, Any],
    *,
    combiner_weights: Mapping[str, Any] | None = None,
    model: Callable[[Any, Any, dict[str, Any]], Any] | None = None,
    params: Any = None,
    dense: Mapping[str, int | Sequence[int]] | None = None,
) -> pathlib.Path:
    """Writes lookups, and the dense model on top of them, as one SavedModel.

    Args:
      out: a new folder; TensorFlow Serving wants it named by a number.
      feature_config: the feature configuration. Of an output_shape, ragged batches have as many bags as its product,
        which are combined: smaller ones, a sequence a bag, have no place in a SavedModel.
      tables: by TableConfig or name, [V, D] float32, bfloat16 or float16, or QuantizedTables, whose values are written.
        Arrays of tables with a quantization_config are written as training looked them up.
      combiner_weights: by table name, the [num_weights] weights of its CustomCombiner.
      model: `model(params, activations, dense)` returns a pytree of arrays with leading dimension B; an output is
        named by its path, or "output" where it is the only one. None gives the activations.
      params: a pytree of arrays.
      dense: by name, the shape of one row of the float32 inputs that the model takes besides; an int K for [K].

    Returns:
      The folder.

    Raises:
      ValueError: if `out` is there, a table does not fit, or a feature or name has no place in a SavedModel.
    """
    place, shapes = path_of(out), dense_shapes(dense or {}, "dense")
    check_new(place)
    taken = {name for kind in kinds_of(feature_config) for name in Inputs(feature_config, kind, {}).names}
    for name in shapes:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in taken:
            raise ValueError(f"a dense input cannot be named {name!r} in a signature; rename it.")
    if shapes and model is None:
        raise ValueError(f"dense inputs {sorted(shapes)} need a model that takes them.")
    arrays = {
        name: _looked_up(config, table_of(tables, config))
        for name, config in feature_tables(feature_config).items()
    }
    with published(place) as scratch:
        _save(scratch, feature_config, arrays, combiner_weights or {}, model, params, shapes, {})
    return place


def _save(
    out: pathlib.Path,
    feature_config: Any,
    tables: Mapping[str, np.ndarray],
    combiner_weights: Mapping[str, Any],
    model: Callable[..., Any] | None,
    params: Any,
    dense: Mapping[str, tuple[int, ...]],
    more: Mapping[str, Any],
) -> list[str]:
    """Writes it, with a sidecar that has `more`; notes."""
    tf: Any = needed("tensorflow", "saved-model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export: Any = needed("orbax.export", "saved-model")
        leaves, treedef = jax.tree.flatten(params)
        variables = {
            "tables": [_tensor(tf, rows) for rows in tables.values()],
            "combiners": [np.asarray(value, np.float32) for value in combiner_weights.values()],
            "model": [np.asarray(leaf) for leaf in leaves],
        }
        inputs = {kind.signature: Inputs(feature_config, kind, dense) for kind in kinds_of(feature_config)}
        names = feature_names(feature_config)

        def function(kind: Inputs) -> Callable[[Any, Any], dict[str, Any]]:
            def run(values: Any, arrays: Any) -> dict[str, Any]:
                found = serving_embedding_lookup(
                    *kind.lookup_inputs(arrays),
                    dict(zip(tables, values["tables"], strict=True)),
                    feature_config,
                    combiner_weights=dict(zip(combiner_weights, values["combiners"], strict=True)),
                )
                if model is None:
                    return {names[structure.join(path)]: leaf for path, leaf in structure.flatten(found)}
                return _named(model(jax.tree.unflatten(treedef, values["model"]), found, arrays["dense"]))

            return run

        with use_backend("xla"), tf.device("/cpu:0"):
            module = export.JaxModule(
                variables,
                {name: function(kind) for name, kind in inputs.items()},
                input_polymorphic_shape={name: kind.polymorphic_shapes() for name, kind in inputs.items()},
                jax2tf_kwargs={name: {"native_serialization_platforms": PLATFORMS} for name in inputs},
                jit_compile=False,
            )
            manager = export.ExportManager(
                module,
                [
                    export.ServingConfig(
                        name,
                        input_signature=[kind.signature(tf)],
                        tf_preprocessor=kind.preprocessor(tf),
                        extra_trackable_resources=kind.resources(tf, out.parent),
                        method_key=name,
                    )
                    for name, kind in inputs.items()
                ],
            )
            ragged = next(iter(inputs.values()))
            manager.tf_module.lookup = tf.function(
                lambda found: module.methods[ragged.kind.signature](
                    ragged.preprocessor(tf)(ragged.flat(found))
                ),
                input_signature=[ragged.ragged_signature(tf)],
                autograph=False,
            )
            manager.save(str(out))
    # orbax.export numbers the leaves of the variables.
    places = jax.tree.unflatten(jax.tree.structure(variables), range(len(jax.tree.leaves(variables))))["tables"]
    keys = {name: VARIABLE.format(place) for name, place in zip(tables, places, strict=True)}
    try:
        content = make_sidecar(feature_config, combiner_weights, **more, keys=keys)
    except ValueError as e:
        return [f"without {EXTRA}/{SIDECAR}, by which jaxembed reads tables back: {e}"]
    (out / EXTRA).mkdir()
    write_file(out / EXTRA / SIDECAR, [content])
    return []


def _keys(where: pathlib.Path, content: bytes) -> dict[str, str]:
    keys = strict_json(content).get("keys")
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise CheckpointError(f"{where} does not say which variable is which table: its keys are {keys!r:.80}.")
    return keys


def _tensor(tf: Any, rows: np.ndarray) -> Any:
    """A tensor of these very bytes, where numpy lends them: a variable then takes no memory of its own."""
    if not rows.flags.writeable or not rows.flags.c_contiguous or rows.ctypes.data % 64:
        return tf.convert_to_tensor(rows)
    # numpy lends no bfloat16.
    lent = np.asarray(rows).view(bits(rows.dtype))
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(lent.__dlpack__()), tf.as_dtype(rows.dtype))


def _as_trained(config: TableConfig) -> Callable[[np.ndarray], np.ndarray] | None:
    quantization = config.quantization_config
    return None if quantization is None else lambda rows: simulate_on_host(rows, quantization)


def _looked_up(config: TableConfig, table: Any) -> np.ndarray:
    """[V, D] values that serving looks up."""
    dtype, change = np.dtype(table.dtype), None
    if dtype.name not in DTYPES:
        raise ValueError(f"table {config.name!r} must be one of {DTYPES} in a SavedModel, got {dtype.name}.")
    if isinstance(table, QuantizedTable):
        codes = dataclasses.replace(table, **{part: np.asarray(array) for part, array in table.arrays.items()})
        rows = StoredQuantized(config.name, codes.codes, table=codes)
    else:
        array, change = np.asarray(table), _as_trained(config)
        if change is None:
            return array
        rows = StoredArray(config.name, array)
    out = aligned_empty(rows.shape, dtype)
    for start, block in rows.blocks():
        out[start : start + block.shape[0]] = block if change is None else change(block)
    return out


def _named(outputs: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(outputs)
    keystr = jax.tree_util.keystr
    return {plain(keystr(path, simple=True, separator="_")) or "output": leaf for path, leaf in leaves}
