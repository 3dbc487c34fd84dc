"""Finds, on the host, ids that no table row answers to."""

from typing import Any

import numpy as np

from jaxembed.combiners import CustomCombiner, ranks_on_host
from jaxembed.config import TableConfig
from jaxembed.inputs.ids import is_concrete
from jaxembed.inputs.ragged import check_row_splits


def check_splits(path: str, lookup: Any) -> None:
    """Raises ValueError if the row splits of a `Lookup` are malformed, as far as they can be looked at.

    A constructor has looked at those of the host, but not where `jax.device_get` or `jax.tree.map` made them.
    """
    bag, operands = lookup.bag, lookup.operands
    if bag.layout == "ragged" and is_concrete(operands.bags):
        check_row_splits(np.asarray(operands.bags), operands.ids.shape[0], f"Feature {path!r}")


def check_ids(path: str, table: TableConfig, lookup: Any) -> None:
    """Raises ValueError naming the first id of a `Lookup` that is outside [0, V) and not pruned.

    Ids inside a trace cannot be looked at; they are left to the kernel's policy.
    """
    bag, operands = lookup.bag, lookup.operands
    if not all(is_concrete(array) for array in operands[1:]):
        return
    ids = np.asarray(operands.ids)
    bad = (ids < 0) | (ids >= table.vocabulary_size)
    if not bad.any():
        return
    bad &= _looked_up(bag, operands, ids)
    if not bad.any():
        return
    at = int(np.argmax(bad))
    more = int(bad.sum()) - 1
    others = f" (and {more} more)" if more else ""
    raise ValueError(
        f"Feature {path!r}: id {ids[at]} at position {at}{_row(bag, operands, at)} is outside of table "
        f"{table.name!r} with vocabulary_size {table.vocabulary_size}{others}; ids must be in "
        f"[0, {table.vocabulary_size}). Map or drop unknown ids first."
    )


def _looked_up(bag: Any, operands: Any, ids: np.ndarray) -> np.ndarray:
    position = np.arange(ids.shape[0])
    live, rows = np.ones(ids.shape[0], bool), None
    if bag.layout == "ragged":
        splits = np.asarray(operands.bags)
        live = position < splits[-1]
        if length := _length(bag):
            row = np.clip(np.searchsorted(splits, position, side="right") - 1, 0, None)
            live &= position - splits[row] < length
    elif bag.layout == "sparse":
        rows = np.asarray(operands.bags)
        live = (rows >= 0) & (rows < bag.num_bags)
        if bag.sequence_length:
            columns = np.asarray(operands.columns)
            live &= (columns >= 0) & (columns < bag.sequence_length)
    if bag.prune_ids:
        live &= ids >= 0
    if bag.prune_weights and operands.weights is not None:
        live &= np.asarray(operands.weights) > 0
    if rows is not None and isinstance(bag.combiner, CustomCombiner):
        live &= ranks_on_host(rows, live) < bag.combiner.max_valency
    return live


def _length(bag: Any) -> int:
    """How many ids of a ragged bag are looked up; 0 for all."""
    return bag.combiner.max_valency if isinstance(bag.combiner, CustomCombiner) else bag.sequence_length


def _row(bag: Any, operands: Any, at: int) -> str:
    if bag.layout == "ragged":
        return f", row {int(np.searchsorted(np.asarray(operands.bags), at, side='right')) - 1}"
    if bag.layout == "sparse":
        return f", row {int(np.asarray(operands.bags)[at])}"
    return ""
