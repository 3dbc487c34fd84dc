"""Takes a request apart along the feature configuration, whose leaves may be lists themselves."""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxembed.config import FeatureConfig
from jaxembed.features import flat_features
from jaxembed.preprocessing import preprocess_leaf


class Reader:
    """Reads the leaves of structures like `feature_config`, in the order of `jaxembed.structure.flatten`."""

    def __init__(self, feature_config: Any):
        self._feature_config = feature_config
        self._take: Callable[[Any], Iterable[Any]] | None = None
        self._count = 0
        features = list(flat_features(feature_config).items())
        self._preprocessed = [(i, *f) for i, f in enumerate(features) if f[1].preprocessing is not None]
        if isinstance(feature_config, Mapping) and all(
            isinstance(child, FeatureConfig) for child in feature_config.values()
        ):
            keys = sorted(feature_config, key=str)
            # Of one key, an itemgetter gives the leaf by itself.
            self._take = (
                operator.itemgetter(*keys) if len(keys) > 1 else lambda tree: [tree[key] for key in keys]
            )
            self._count = len(keys)

    def inputs(self, tree: Any) -> list[Any]:
        """One leaf for every feature, its ids as rows of its table.

        Raises:
          ValueError: if a feature is missing or unknown, the structure is another, or an id has no row.
        """
        leaves = self._leaves(tree)
        for i, path, feature in self._preprocessed:
            leaves[i] = preprocess_leaf(path, feature, leaves[i])
        return leaves

    def _leaves(self, tree: Any) -> list[Any]:
        if self._take is not None and isinstance(tree, dict) and len(tree) == self._count:
            try:
                return list(self._take(tree))
            except KeyError:
                pass  # reported below
        leaves: list[Any] = []
        _walk(self._feature_config, tree, (), "inputs", leaves)
        return leaves

    def weights(self, tree: Any) -> list[Any]:
        """One leaf for every feature, None where `tree` has None or nothing.

        Raises:
          ValueError: if a feature is unknown, or the structure is another.
        """
        leaves: list[Any] = []
        _walk(self._feature_config, tree, (), "weights", leaves)
        return leaves


def _walk(config: Any, tree: Any, path: tuple[str, ...], what: str, leaves: list[Any]) -> None:
    optional = what == "weights"
    if isinstance(config, FeatureConfig):
        if tree is None and not optional:
            raise ValueError(
                f"{what} must have feature {'/'.join(path)!r}, got None; pass [] for a row without."
            )
        leaves.append(tree)
        return
    children = _children(config)
    if tree is None and optional:
        for key, child in children:
            _walk(child, None, (*path, str(key)), what, leaves)
        return
    where = f" at {'/'.join(path)!r}" if path else ""
    if _is_sequence(config):
        if not isinstance(tree, list | tuple) or len(tree) != len(children):
            received = f"{len(tree)} entries" if isinstance(tree, list | tuple) else type(tree).__name__
            raise ValueError(
                f"{what}{where} must be a list or tuple of {len(children)} entries, got {received}."
            )
        for (key, child), value in zip(children, tree, strict=True):
            _walk(child, value, (*path, str(key)), what, leaves)
        return
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()  # type: ignore[attr-defined]
    names = [str(key) for key, _ in children]  # of keys that are numbers, what requests in JSON have
    if not isinstance(tree, Mapping):
        raise ValueError(f"{what}{where} must be a dict with {names}, got {type(tree).__name__}.")
    given: dict[str, Any] = {}
    for key in tree:
        if str(key) in given:
            raise ValueError(
                f"{what}{where} has feature {str(key)!r} twice, as {given[str(key)]!r} and as {key!r}; pass it once."
            )
        given[str(key)] = key
    unknown = [key for key in given if key not in names]
    if unknown:
        raise ValueError(f"{what}{where} has no feature {unknown[0]!r}; features are {names}.")
    for name, (_, child) in zip(names, children, strict=True):
        if name not in given and not optional:
            raise ValueError(f"{what}{where} must have all of {names}, but {name!r} is missing.")
        _walk(child, tree[given[name]] if name in given else None, (*path, name), what, leaves)


def _is_sequence(config: Any) -> bool:
    return not isinstance(config, Mapping) and not hasattr(config, "_fields")


def _children(config: Any) -> list[tuple[Any, Any]]:
    if isinstance(config, Mapping):
        return [(key, config[key]) for key in sorted(config, key=str)]
    if hasattr(config, "_fields"):
        return list(zip(config._fields, config, strict=True))
    return list(enumerate(config))
