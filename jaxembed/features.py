"""Checks a feature configuration as a whole and matches inputs and weights to it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxembed import structure
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.inputs.ids import native_order


class FeatureInput(NamedTuple):
    """One feature of a request: its path, its configuration, its ids and its weights (or None)."""

    path: str
    feature: FeatureConfig
    ids: Any
    weights: Any


def flat_features(feature_config: Any) -> dict[str, FeatureConfig]:
    """The features of a configuration by path, such as "user/history".

    Raises:
      ValueError: if a leaf is no FeatureConfig, two features share a name, or two tables share a name
        and differ.
    """
    features: dict[str, FeatureConfig] = {}
    names: dict[str, str] = {}
    tables: dict[str, TableConfig] = {}
    for key, feature in structure.flatten(feature_config):
        path = structure.join(key)
        if not isinstance(feature, FeatureConfig):
            raise ValueError(
                f"feature_config must be a structure of FeatureConfig, got {type(feature).__name__} at {path!r}."
            )
        if path in features:
            raise ValueError(f"feature_config has two features at {path!r}; rename a key that holds '/'.")
        features[path] = feature
        if feature.name is not None:
            if feature.name in names:
                raise ValueError(
                    f"features {names[feature.name]!r} and {path!r} are both named {feature.name!r}; "
                    "give each a name of its own."
                )
            names[feature.name] = path
        known = tables.setdefault(feature.table.name, feature.table)
        if known != feature.table:
            raise ValueError(
                f"two tables are named {known.name!r} but differ: {known} and {feature.table}; "
                "share one TableConfig, or rename one."
            )
    if not features:
        raise ValueError("feature_config must hold at least one FeatureConfig, got none.")
    return features


def feature_tables(feature_config: Any) -> dict[str, TableConfig]:
    """The tables that a configuration uses, by name, in the order of their names.

    Raises:
      ValueError: as `flat_features`.
    """
    tables = {feature.table.name: feature.table for feature in flat_features(feature_config).values()}
    return {name: tables[name] for name in sorted(tables)}


def match(inputs: Any, weights: Any, feature_config: Any) -> list[FeatureInput]:
    """Pairs each input with its feature and weights.

    Raises:
      ValueError: if inputs are not a subset of `feature_config`, or `weights` is not a structure like
        `inputs` (None for no weights).
    """
    features = flat_features(feature_config)
    flat_inputs = [(structure.join(key), leaf) for key, leaf in structure.flatten(inputs)]
    unknown = [path for path, _ in flat_inputs if path not in features]
    if unknown:
        raise ValueError(
            f"Inputs are not a subset of feature_config: it has no feature {unknown[0]!r}. "
            f"Inputs are {[path for path, _ in flat_inputs]}, features are {list(features)}.{_hint(unknown[0], features)}"
        )
    flat_weights: list[Any] = [None] * len(flat_inputs)
    if weights is not None:
        pairs = [(structure.join(key), leaf) for key, leaf in structure.flatten(weights)]
        if not structure.alike(inputs, weights):
            raise ValueError(
                "weights must have the structure of inputs, with None for features without: inputs are "
                f"{[path for path, _ in flat_inputs]}, weights are {[path for path, _ in pairs]}."
            )
        flat_weights = [leaf for _, leaf in pairs]
    return [
        FeatureInput(path, features[path], ids, weight)
        for (path, ids), weight in zip(flat_inputs, flat_weights, strict=True)
    ]


def _hint(path: str, features: Mapping[str, Any]) -> str:
    """What to do about the parts of a feature's value, which Python lists are taken for."""
    whole = next((name for name in features if path.startswith(f"{name}/")), None)
    return "" if whole is None else f" Convert the lists of {whole!r} with jaxembed.as_input first."


def table_of(tables: Mapping[Any, Any], config: TableConfig) -> Any:
    """The array of a table, from a dict keyed by TableConfig or by name.

    Raises:
      ValueError: if it is missing, or no floating point array of [vocabulary_size, dim].
    """
    if not isinstance(tables, Mapping):
        raise ValueError(
            f"tables must be a dict of TableConfig (or table name) to [V, D] array, got {type(tables).__name__}."
        )
    if config in tables:
        table = tables[config]
    elif config.name in tables:
        table = tables[config.name]
    else:
        known = sorted(key.name if isinstance(key, TableConfig) else str(key) for key in tables)
        raise ValueError(
            f"tables has no table for {config.name!r} (by TableConfig or by name); it has {known}. "
            "A TableConfig key must equal the one in the feature configuration."
        )
    if not hasattr(table, "shape") or not hasattr(table, "dtype"):
        raise ValueError(
            f"table {config.name!r} must be an array or a QuantizedTable, got {type(table).__name__}; "
            "convert it with numpy.asarray."
        )
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(
            f"table {config.name!r} must be floating point, got {table.dtype}; convert it to "
            f"{config.dtype.name}, or decode it with jaxembed.QuantizedTable."
        )
    shape = tuple(table.shape)
    if shape != (config.vocabulary_size, config.dim):
        raise ValueError(
            f"table {config.name!r} must be [{config.vocabulary_size}, {config.dim}] "
            f"(vocabulary_size, dim), got shape {list(shape)}."
        )
    return native_order(table)
