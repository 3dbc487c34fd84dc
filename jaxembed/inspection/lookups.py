"""What lookups in two checkpoints, bundles or files do otherwise, besides the rows that they look up."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxembed.combiners import CustomCombiner
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.features import flat_features
from jaxembed.inspection.opening import Inspected, open_any

#: Of tables; their sizes and types show in the tables themselves, and optimizers and initializers are of training.
TABLE_FIELDS = ("combiner", "quantization_config")
FEATURE_FIELDS = tuple(
    field.name for field in dataclasses.fields(FeatureConfig) if field.name not in ("table", "name")
)


@dataclasses.dataclass(frozen=True)
class LookupDifference:
    """How the lookups of two differ.

    Attributes:
      changes: what of the features, the tables' configurations and the weights of custom combiners, a line each.
      not_compared: what one of them has not, and what is never compared.
    """

    changes: tuple[str, ...]
    not_compared: tuple[str, ...]


def lookup_difference(a: str | pathlib.Path, b: str | pathlib.Path) -> LookupDifference:
    """How lookups in `b` differ from those in `a`; no table is read, and optimizers and dense models are not compared.

    Args:
      a: whatever `open_any` opens.
      b: likewise.

    Raises:
      FileNotFoundError: if there is none at a path.
      ValueError: if one is damaged.
    """
    first, second = open_any(a), open_any(b)
    not_compared = []
    with_config = [one for one in (first, second) if one.feature_config is not None]
    if len(with_config) == 1:
        not_compared.append(f"feature configurations, as only {with_config[0].path} has one")
    with_slots = [one for one in (first, second) if one.slots]
    if len(with_slots) == 1:
        not_compared.append(f"slots, as only {with_slots[0].path} has some")
    if first.has_model or second.has_model:
        not_compared.append("dense models")
    changes = (*_of_tables(first, second), *_of_features(first, second)) if len(with_config) == 2 else ()
    return LookupDifference(changes, tuple(not_compared))


def _of_tables(first: Inspected, second: Inspected) -> Iterator[str]:
    were, are = first.configs, second.configs
    for name in sorted(were.keys() & are.keys()):
        yield from _changed(f"table {name!r}", were[name], are[name], TABLE_FIELDS)
        was, now = first.combiner_weights.get(name), second.combiner_weights.get(name)
        if was is not None and now is not None and not np.array_equal(was, now, equal_nan=True):
            yield f"table {name!r}: the weights of its combiner"


def _of_features(first: Inspected, second: Inspected) -> Iterator[str]:
    were, are = flat_features(first.feature_config), flat_features(second.feature_config)
    for path in sorted(were.keys() | are.keys()):
        if path not in were or path not in are:
            yield f"feature {path!r}: {'added' if path in are else 'removed'}"
            continue
        was, now = were[path], are[path]
        if was.table.name != now.table.name:
            yield f"feature {path!r}: table {was.table.name!r} to {now.table.name!r}"
        yield from _changed(f"feature {path!r}", was, now, FEATURE_FIELDS)


def _changed(
    what: str, first: TableConfig | FeatureConfig, second: TableConfig | FeatureConfig, names: tuple[str, ...]
) -> Iterator[str]:
    for name in names:
        was, now = getattr(first, name), getattr(second, name)
        if _seen(was) != _seen(now):
            yield f"{what}: {name} {was!r:.200} to {now!r:.200}"


def _seen(value: Any) -> Any:
    """What lookups see of it: the initializer and learning rate of a custom combiner's weights are of training."""
    if isinstance(value, CustomCombiner):
        return value.combiner_computation, value.max_valency, value.num_weights
    return value
