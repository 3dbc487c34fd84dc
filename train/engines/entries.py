"""The entries of a feature: which of its ids are looked up, where their rows lie, and the bags they belong to."""

from typing import NamedTuple

import numpy as np

from jaxembed.lookup import Lookup

from .batch import FeatureLayout
from .placement import Stack, TablePlacement


class Entries(NamedTuple):
    """The entries of one feature over all shards, in the order of their segments.

    Attributes:
      positions: [N] in the stack.
      segments: [N] in [0, B * inner).
      source: [N] which id of the input each is.
      bad_ids: [n], by shard.
    """

    positions: np.ndarray
    segments: np.ndarray
    source: np.ndarray
    bad_ids: np.ndarray


def feature_entries(
    feature: FeatureLayout, lookup: Lookup, stack: Stack, num_shards: int, live_rows: np.ndarray | None = None
) -> Entries:
    """The entries of a feature; the inputs hold the rows of `num_shards` shards, of which `live_rows` have entries."""
    bag, operands = lookup.bag, lookup.operands
    ids = np.asarray(operands.ids).reshape(-1)
    source, segments = _segments(feature, lookup, ids.size)
    live = np.ones(source.size, bool) if live_rows is None else live_rows[segments // feature.inner]
    if bag.prune_ids:
        live &= ids[source] >= 0
    if bag.prune_weights and operands.weights is not None:
        live &= np.asarray(operands.weights)[source] > 0
    in_range = (ids[source] >= 0) & (ids[source] < feature.feature.table.vocabulary_size)
    size = feature.num_segments
    bad = live & ~in_range
    bad_ids = np.bincount(segments[bad] // size, minlength=num_shards) if bad.any() else np.zeros(num_shards)
    keep = live & in_range
    if not keep.all():
        source, segments = source[keep], segments[keep]
    if source.size and np.any(segments[1:] < segments[:-1]):
        order = np.argsort(segments, kind="stable")
        source, segments = source[order], segments[order]
    positions = stack.position(placement_of(stack, feature), ids[source].astype(np.int64))
    return Entries(positions, segments, source, bad_ids)


def _segments(feature: FeatureLayout, lookup: Lookup, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Which ids are entries (not padding, not truncated), and the segment of each."""
    bag, operands = lookup.bag, lookup.operands
    if bag.layout == "dense":
        return np.arange(num_ids), np.arange(num_ids)
    bags = np.asarray(operands.bags).astype(np.int64)
    length = bag.sequence_length
    if bag.layout == "ragged":
        source = np.arange(bags[0], bags[-1])
        row = np.repeat(np.arange(bag.num_bags), np.diff(bags))
        if not length:
            return source, row
        column = source - bags[row]
        live = column < length
        return source[live], (row * length + column)[live]
    live = (bags >= 0) & (bags < bag.num_bags)
    segments = bags
    if length:
        column = np.asarray(operands.columns)
        live &= (column >= 0) & (column < length)
        segments = segments * length + column
    source = np.flatnonzero(live)
    return source, segments[source]


def placement_of(stack: Stack, feature: FeatureLayout) -> TablePlacement:
    """Where the table of a feature lies in its stack."""
    return next(p for p in stack.placements if p.table.name == feature.feature.table.name)
