"""Exact JSON round trip of feature configurations, so that a checkpoint carries its own."""

import collections
import dataclasses
import functools
import json
import keyword
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxembed.combiners import CustomCombiner, combiner_from_dict
from jaxembed.config import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.features import feature_tables, flat_features
from jaxembed.id_mapping import preprocessing_from_dict, preprocessing_to_dict
from jaxembed.initializers import initializer_from_dict, initializer_to_dict
from jaxembed.names import UnregisteredError
from jaxembed.optimizers import Optimizer, optimizer_from_dict
from jaxembed.unregistered import UnregisteredOptimizer

FORMAT_VERSION = 1


def feature_config_to_json(feature_config: Any) -> str:
    """The configuration as JSON text; `feature_config_from_json` gives it back, equal.

    Args:
      feature_config: dicts with str keys, lists, tuples and namedtuples of FeatureConfig.

    Raises:
      ValueError: if it holds something that has no registered name, such as a lambda for an initializer, or
        an argument that is not JSON.
    """
    tables = feature_tables(feature_config)
    return json.dumps(
        {
            "version": FORMAT_VERSION,
            "tables": [_table_to_dict(table) for table in tables.values()],
            "features": _structure_to_json(feature_config),
        },
        allow_nan=False,
    )


def feature_config_from_json(text: str, *, keep_unregistered: bool = False) -> Any:
    """The feature configuration that `feature_config_to_json` wrote.

    A namedtuple comes back as a namedtuple of the same name and fields, any other kind of dict as a dict: activations
    come in the order of their keys from each. Names are looked up among what is registered; nothing is imported or run.

    Args:
      text: JSON.
      keep_unregistered: whether optimizers and initializers, those of combiners' weights too, that are not registered
        or whose classes do not take the stored arguments are kept as stored, an error only where they are used.
        Combiners are looked up with, so are never.

    Raises:
      UnregisteredError: if it names a function or class that is not registered, or a class that does not take the
        stored arguments.
      ValueError: if `text` is no such JSON, or is of a newer version.
    """
    try:
        data = strict_json(text)
        version = data["version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"feature configuration has format version {version!r}, this jaxembed reads "
                f"{FORMAT_VERSION}; upgrade jaxembed."
            )
        tables: dict[str, TableConfig] = {}
        for table in (_table_from_dict(stored, keep_unregistered) for stored in data["tables"]):
            if table.name in tables:
                raise ValueError(f"not a feature configuration: it has two tables named {table.name!r}.")
            tables[table.name] = table
        feature_config = _structure_from_json(data["features"], tables)
        flat_features(feature_config)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(
            f"not a feature configuration: {type(e).__name__}: {e}; expected the JSON text that "
            "feature_config_to_json writes."
        ) from e
    return feature_config


def strict_json(text: str | bytes) -> Any:
    """`json.loads` without its leniencies.

    Raises:
      ValueError: if `text` is not JSON, is nested too deep, repeats a key, or holds NaN or infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            raise ValueError(
                f"key {next(key for key, count in counts.items() if count > 1)!r:.80} is there twice"
            )
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"not valid JSON: {str(e) or type(e).__name__}.") from e


def _table_to_dict(table: TableConfig) -> dict[str, Any]:
    optimizer, combiner = table.optimizer, table.combiner
    quantization = table.quantization_config
    return {
        "name": table.name,
        "vocabulary_size": table.vocabulary_size,
        "dim": table.dim,
        "dtype": jnp.dtype(table.dtype).name,
        "initializer": initializer_to_dict(table.initializer, f"table {table.name!r}"),
        "optimizer": None if optimizer is None else _optimizer_to_dict(optimizer, table.name),
        "combiner": combiner.to_dict() if isinstance(combiner, CustomCombiner) else combiner,
        "quantization_config": None if quantization is None else dataclasses.asdict(quantization),
    }


def _table_from_dict(data: dict[str, Any], keep_unregistered: bool) -> TableConfig:
    combiner, quantization = data["combiner"], data["quantization_config"]
    if not _is_size(data["vocabulary_size"]) or not _is_size(data["dim"]) or not isinstance(data["dtype"], str):
        raise ValueError(
            "not a feature configuration: vocabulary_size and dim must be ints below 2**31 and dtype a name, "
            f"got {data['vocabulary_size']!r:.80}, {data['dim']!r:.80} and {data['dtype']!r:.80}."
        )
    try:
        initializer = initializer_from_dict(data["initializer"], keep_unregistered)
        optimizer = _optimizer_from_dict(data["optimizer"], keep_unregistered)
        if not isinstance(combiner, str):
            combiner = combiner_from_dict(combiner, keep_unregistered)
    except UnregisteredError as e:
        raise UnregisteredError(f"table {data['name']!r:.80}: {e}") from e
    return TableConfig(
        data["vocabulary_size"],
        data["dim"],
        initializer=initializer,
        optimizer=optimizer,
        combiner=combiner,
        name=data["name"],
        quantization_config=None if quantization is None else QuantizationConfig(**quantization),
        dtype=data["dtype"],
    )


def _optimizer_to_dict(optimizer: Optimizer, table: str) -> dict[str, Any]:
    try:
        return optimizer.to_dict()
    except ValueError as e:
        raise ValueError(f"table {table!r}: {e}") from e


def _optimizer_from_dict(data: dict[str, Any] | None, keep_unregistered: bool) -> Optimizer | None:
    try:
        return None if data is None else optimizer_from_dict(data)
    except UnregisteredError as e:
        if not keep_unregistered:
            raise
        return UnregisteredOptimizer(stored=json.dumps(data), reason=str(e))


def _structure_to_json(tree: Any) -> dict[str, Any]:
    if isinstance(tree, FeatureConfig):
        feature = {
            "table": tree.table.name,
            "max_sequence_length": tree.max_sequence_length,
            "validate_weights_and_indices": tree.validate_weights_and_indices,
            "output_shape": tree.output_shape,
            "name": tree.name,
        }
        if tree.preprocessing is not None:  # left out otherwise, so that earlier versions read it
            feature["preprocessing"] = preprocessing_to_dict(tree.preprocessing)
        return {"feature": feature}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise ValueError(f"feature_config keys must be str to be stored, got {key!r}.")
        return {"dict": {key: _structure_to_json(child) for key, child in tree.items()}}
    names = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and names is not None:
        fields = {field: _structure_to_json(getattr(tree, field)) for field in names}
        return {"namedtuple": type(tree).__name__, "fields": fields}
    return {"list" if isinstance(tree, list) else "tuple": [_structure_to_json(child) for child in tree]}


def _structure_from_json(data: dict[str, Any], tables: dict[str, TableConfig]) -> Any:
    kinds = sorted(data.keys() - {"fields"})
    if len(kinds) != 1 or ("fields" in data) != (kinds == ["namedtuple"]):
        raise ValueError(f"not a feature configuration: a structure has the keys {sorted(data)}.")
    kind = kinds[0]
    if kind == "feature":
        return _feature_from_dict(data["feature"], tables)
    if kind == "dict":
        return {key: _structure_from_json(child, tables) for key, child in data["dict"].items()}
    if kind == "namedtuple":
        fields = data["fields"]
        cls = _namedtuple(data["namedtuple"], tuple(fields))
        return cls(**{field: _structure_from_json(child, tables) for field, child in fields.items()})
    if kind not in ("list", "tuple") or not isinstance(data[kind], list):
        raise ValueError(f"not a feature configuration: a structure cannot be {kind!r}: {data[kind]!r:.80}.")
    children = [_structure_from_json(child, tables) for child in data[kind]]
    return children if kind == "list" else tuple(children)


def _feature_from_dict(data: dict[str, Any], tables: dict[str, TableConfig]) -> FeatureConfig:
    arguments = dict(data)
    table = arguments.pop("table")
    if table not in tables:
        raise ValueError(f"not a feature configuration: it has no table {table!r}, only {sorted(tables)}.")
    validate, length = arguments["validate_weights_and_indices"], arguments["max_sequence_length"]
    if not isinstance(validate, bool) or not _is_size(length):
        raise ValueError(
            "not a feature configuration: validate_weights_and_indices must be true or false, "
            f"max_sequence_length an int below 2**31, got {validate!r:.80} and {length!r:.80}."
        )
    preprocessing = arguments.pop("preprocessing", None)
    if preprocessing is not None:
        preprocessing = preprocessing_from_dict(preprocessing)
    return FeatureConfig(tables[table], **arguments, preprocessing=preprocessing)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@functools.cache
def _namedtuple(name: Any, fields: tuple[str, ...]) -> type:
    # namedtuple itself builds source text from these.
    for word in (name, *fields):
        if not isinstance(word, str) or not word.isidentifier() or keyword.iskeyword(word):
            raise ValueError(
                f"not a feature configuration: {word!r:.80} cannot name a namedtuple or its field."
            )
    if any(field.startswith("_") for field in fields):
        raise ValueError(f"not a feature configuration: namedtuple fields {fields} cannot start with '_'.")
    return collections.namedtuple(name, fields)
