"""Nested structures of features: dicts, lists, tuples and namedtuples, flattened with their paths.

`jax.tree` would do but for two things: the inputs may be a subset of the feature configuration, and
None must stay a leaf, so features are matched by path here.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[str, ...]


def flatten(tree: Any, prefix: Path = ()) -> list[tuple[Path, Any]]:
    """The leaves of `tree` with their paths, dict entries in the order of their keys."""
    entries = children(tree)
    if entries is None:
        return [(prefix, tree)]
    return [leaf for key, child in entries for leaf in flatten(child, (*prefix, str(key)))]


def pack(tree: Any, leaves: Iterator[Any], own_order: bool = False) -> Any:
    """A structure like `tree` with its leaves taken from `leaves`, in the order of `flatten`; see `rebuild`."""
    entries = children(tree)
    if entries is None:
        return next(leaves)
    return rebuild(tree, [pack(child, leaves, own_order) for _, child in entries], own_order)


def rebuild(tree: Any, values: list[Any], own_order: bool = False) -> Any:
    """A dict, list or tuple like `tree` with `values` for its children, in the order of `children`.

    Any dict comes in the order of its keys, as out of a program of JAX: a model that goes through its activations must
    find them in one order in training and serving. So does an OrderedDict, whose order JAX would keep: batches, and
    configurations that were stored, hold dicts in its place. With `own_order` dicts keep theirs: JAX takes OrderedDicts
    of two orders for two structures, and a caller may map over both `tree` and this.
    """
    if isinstance(tree, Mapping):
        packed = dict(zip(sorted(tree, key=str), values, strict=True))
        with contextlib.suppress(TypeError):  # of keys that have no order, which are no pytree either
            packed = {key: packed[key] for key in (tree if own_order else sorted(packed))}
        # JAX tells these apart from a dict.
        if isinstance(tree, collections.OrderedDict):
            return collections.OrderedDict(packed)
        if isinstance(tree, collections.defaultdict):
            return collections.defaultdict(tree.default_factory, packed)
        return packed
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def alike(one: Any, other: Any) -> bool:
    """Whether two structures have the same keys, and sequences and dicts at the same places."""
    entries, others = children(one), children(other)
    if entries is None or others is None:
        return entries is others
    return (
        isinstance(one, Mapping) == isinstance(other, Mapping)
        and [key for key, _ in entries] == [key for key, _ in others]
        and all(alike(a, b) for (_, a), (_, b) in zip(entries, others, strict=True))
    )


def map_leaves(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """A structure like `tree` with each leaf replaced by `function(path, leaf)`."""
    return pack(tree, iter([function(path, leaf) for path, leaf in flatten(tree)]))


def join(path: Path) -> str:
    """The path as TensorFlow writes it: "user/history/0"; "" for a bare leaf."""
    return "/".join(path)


def children(tree: Any) -> list[tuple[Any, Any]] | None:
    """The keys and children of a dict (in the order of its keys), a list or a tuple; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(key, tree[key]) for key in sorted(tree, key=str)]
    fields = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and fields is not None:
        return list(zip(fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return list(enumerate(tree))
    return None
