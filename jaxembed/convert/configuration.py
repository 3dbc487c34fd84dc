"""The feature configuration and the weights of combiners that go with what is converted: given, found, or made up."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed import structure
from jaxembed.combiners import CustomCombiner
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.convert import formats
from jaxembed.convert.interface import Source
from jaxembed.features import feature_tables, flat_features

COMBINER = "mean"


def fit(
    source: Source, source_format: str, given: Any, combiner: str | None, dtype: str | None
) -> tuple[Any, list[str]]:
    """The feature configuration of what is written, and notes; arguments as `convert`.

    Raises:
      ValueError: if the tables of the source do not fit the one that it or the user gives.
    """
    notes = list(source.notes)
    config = given if given is not None else source.feature_config
    if config is None:
        combiner = combiner or str(getattr(formats.load(source_format), "COMBINER", COMBINER))
        config = _plain(source, combiner)
        notes.append(
            f"no feature configuration given: one feature for each table, of its name, combiner {combiner!r}, "
            "no optimizer"
        )
    elif combiner is not None:
        raise ValueError("combiner is for a source without a feature configuration; this one has one.")
    tables = feature_tables(config)
    for name, table in tables.items():
        if name not in source.tables:
            why = "".join(f" {note}." for note in source.notes if note.startswith("not read:"))
            raise ValueError(
                f"the feature configuration names table {name!r}; there are {sorted(source.tables)}.{why}"
            )
        shape = source.tables[name].shape
        if shape != (table.vocabulary_size, table.dim):
            raise ValueError(
                f"table {name!r} must be [{table.vocabulary_size}, {table.dim}] by its feature configuration, "
                f"got {list(shape)}."
            )
        found = source.tables[name].dtype
        if dtype is None and given is not None and found != table.dtype:
            raise ValueError(
                f"table {name!r} must be {table.dtype.name} by its feature configuration, got {found.name}; "
                f"pass dtype={table.dtype.name!r} (--dtype) to round it, or change the configuration."
            )
    if given is not None and source.feature_config is not None:
        notes += _changes(source.feature_config, given)
    left_out = sorted(source.tables.keys() - tables.keys())
    if left_out:
        notes.append(f"left out, not in the feature configuration: {', '.join(left_out)}")
    types = {name: np.dtype(dtype or source.tables[name].dtype) for name in tables}
    return _with_types(config, types), notes


def _changes(stored: Any, given: Any) -> list[str]:
    """Where rows stand for something else by the configuration that the user gives than by that of the source."""
    notes, tables = [], feature_tables(stored)
    for name, table in feature_tables(given).items():
        was, now = tables[name].quantization_config if name in tables else None, table.quantization_config
        if name in tables and was != now:
            notes.append(
                f"table {name!r} is looked up through {now or 'no quantization'}, and was through {was or 'none'}"
            )
    before = flat_features(stored)
    for path, feature in flat_features(given).items():
        was, now = before[path].preprocessing if path in before else None, feature.preprocessing
        if path in before and was != now:
            notes.append(
                f"feature {path!r} makes rows of its ids by {now or 'nothing'}, and did by {was or 'nothing'}"
            )
    return notes


def combiner_weights_of(
    tables: Mapping[str, TableConfig], given: Mapping[str, Any], path: pathlib.Path
) -> dict[str, np.ndarray]:
    """Those of the tables, float32.

    Args:
      tables: by name, their configurations.
      given: by table name, what the source or the user has.
      path: of the source, for errors.

    Raises:
      ValueError: if some are missing, left over or of another shape.
    """
    weights = {}
    for name, table in tables.items():
        count = table.combiner.num_weights if isinstance(table.combiner, CustomCombiner) else 0
        found = np.asarray(given[name], np.float32) if name in given else None
        if found is None and count:
            raise ValueError(
                f"the CustomCombiner of table {name!r} has {count} weights of its own, which {path} has not; pass "
                f"combiner_weights={{{name!r}: ...}} (--combiner-weights), or a combiner with num_weights=0."
            )
        if found is not None and found.shape != (count,):
            raise ValueError(
                f"combiner_weights of table {name!r} must have the shape [{count}] by its combiner, got "
                f"{list(found.shape)}."
            )
        if found is not None:
            weights[name] = found
    unknown = sorted(given.keys() - tables.keys())
    if unknown:
        raise ValueError(f"combiner_weights are of {unknown}, but the tables are {sorted(tables)}.")
    return weights


def _plain(source: Source, combiner: str) -> dict[str, FeatureConfig]:
    """One feature for each table, of its name."""
    return {
        name: FeatureConfig(
            TableConfig(array.shape[0], array.shape[1], name=name, combiner=combiner, dtype=array.dtype)
        )
        for name, array in source.tables.items()
    }


def _with_types(config: Any, types: Mapping[str, np.dtype]) -> Any:
    for name, dtype in types.items():
        if dtype.itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"table {name!r} is {dtype.name}, which JAX does not train by default; round it with dtype='float32' "
                "(--dtype float32)."
            )

    def change(_, feature: FeatureConfig) -> FeatureConfig:
        table = feature.table
        if table.dtype == types[table.name]:
            return feature
        return dataclasses.replace(feature, table=dataclasses.replace(table, dtype=types[table.name]))

    return structure.map_leaves(change, config)
