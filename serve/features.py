"""The features as they are served: limits and weights."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxembed.config import FeatureConfig
from jaxembed.features import flat_features

DEFAULT_MAX_IDS = 128


@dataclasses.dataclass(frozen=True)
class ServedFeature:
    """How one feature is served.

    Attributes:
      path: its path in the feature configuration.
      config: its FeatureConfig.
      max_ids: the largest number of ids of one row.
      weighted: whether requests may carry weights for it.
    """

    path: str
    config: FeatureConfig
    max_ids: int
    weighted: bool


def served_features(
    feature_config: Any, max_ids: int | Mapping[str, int], weighted: Iterable[str]
) -> tuple[ServedFeature, ...]:
    """The features of a configuration with their limits; the arguments are those of ServingFunction.

    Raises:
      ValueError: if an argument does not fit the configuration, or a feature has an output_shape.
    """
    features = flat_features(feature_config)
    if isinstance(weighted, str):
        raise ValueError(f"weighted must be a list of paths of features, got {weighted!r}.")
    weighted = set(weighted)
    limits = dict(max_ids) if isinstance(max_ids, Mapping) else dict.fromkeys(features, max_ids)
    for name, paths in (("weighted", weighted), ("max_ids_per_row", limits)):
        unknown = sorted(set(paths) - set(features))
        if unknown:
            raise ValueError(f"{name} has no feature {unknown[0]!r}; features are {list(features)}.")
    served = []
    for path, config in features.items():
        limit = limits.get(path, DEFAULT_MAX_IDS)
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit < 2**31:
            raise ValueError(
                f"max_ids_per_row of {path!r} must be an int of at least 1 and below 2**31, got {limit!r}."
            )
        if config.output_shape is not None:
            raise ValueError(
                f"feature {path!r} has output_shape {list(config.output_shape)}, which fixes the batch size; "
                "use dataclasses.replace(feature, output_shape=None) and reshape in the model."
            )
        length = config.max_sequence_length
        if length and path in weighted:
            raise ValueError(f"weighted names {path!r}, which is a sequence feature and takes no weights.")
        served.append(ServedFeature(path, config, length or limit, path in weighted))
    return tuple(served)
