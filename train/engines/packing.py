"""Lays a batch out over the shards on the host, where the values of its ids are there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .batch import BatchLayout, PackedBatch, ShardedBatch
from .entries import feature_entries
from .matching import Plan
from .placement import Stack
from .sparsecore import SparseCoreIds
from .sparsecore_packing import Part, SparseCorePacking, slots_of


def pack_on_host(
    plan: Plan, stacks: Mapping[str, Stack], shards: range, capacity: Any, sparsecore: SparseCorePacking
) -> PackedBatch:
    """The entries of some shards, as numpy arrays whose first axis is `shards`.

    Args:
      plan: its arrays must be concrete.
      stacks: by name.
      shards: which shards; the inputs hold the rows of just these.
      capacity: called as `capacity(stack name, number of entries) -> N`, at least that number.
      sparsecore: packs the stacks that lie on SparseCores.
    """
    weighted = any(lookup.operands.weights is not None for lookup in plan.lookups)
    parts: dict[str, list] = {name: [] for name in stacks}
    bad_ids = np.zeros((len(shards), len(plan.lookups)), np.int32)
    features = zip(plan.layout.features, plan.lookups, plan.live_rows, strict=True)
    for index, (feature, lookup, live_rows) in enumerate(features):
        stack = stacks[feature.stack]
        entries = feature_entries(feature, lookup, stack, len(shards), live_rows)
        bad_ids[:, index] = entries.bad_ids
        weights = None
        if weighted:
            given = lookup.operands.weights
            weights = (
                np.ones(entries.source.size, np.float32)
                if given is None
                else np.asarray(given).astype(np.float32)[entries.source]
            )
        parts[feature.stack].append((feature, entries, weights))
    positions, segments, values, on_sparsecores = {}, {}, {}, {}
    for name, stack in stacks.items():
        if not parts[name]:
            continue
        ids = None
        if stack.cores and plan.layout.num_segments(name):
            of_stack = [Part(f, e.positions, e.segments) for f, e, _ in parts[name]]
            ids = on_sparsecores[name] = sparsecore.pack(stack, of_stack, len(shards))
            if not weighted:
                continue
        joined = _join(
            parts[name],
            stack,
            plan.layout.num_segments(name),
            len(shards),
            lambda n, name=name: capacity(name, n),
        )
        values[name] = joined[2]
        if ids is None:
            positions[name], segments[name] = joined[:2]
        else:
            on_sparsecores[name] = _with_slots(ids, stack, plan.layout, *joined[:2])
    batch = ShardedBatch(positions, segments, on_sparsecores, bad_ids, plan.layout, is_weighted=weighted)
    return PackedBatch(batch, values if weighted else None)


def widen(packed: PackedBatch, stacks: Mapping[str, Stack], room: Mapping[str, int]) -> PackedBatch:
    """The batch with room for `room[stack]` entries a shard, never fewer than it has."""

    def pad(array, name, value):
        return np.pad(array, ((0, 0), (0, room[name] - array.shape[1])), constant_values=value)

    batch, weights = packed.batch, packed.weights
    if dict(room) == packed.room:
        return packed
    no_segment = {name: batch.layout.num_segments(name) for name in room}
    on_sparsecores = dict(batch.sparsecore)
    for name, ids in batch.sparsecore.items():
        if name in room:
            segments = pad(ids.segments, name, no_segment[name])
            slots = pad(ids.slots, name, ids.embedding_ids.shape[1])
            on_sparsecores[name] = dataclasses.replace(ids, segments=segments, slots=slots)
    wider = dataclasses.replace(
        batch,
        positions={name: pad(x, name, stacks[name].num_positions) for name, x in batch.positions.items()},
        segments={name: pad(x, name, no_segment[name]) for name, x in batch.segments.items()},
        sparsecore=on_sparsecores,
    )
    weights = None if weights is None else {name: pad(x, name, 0) for name, x in weights.items()}
    return dataclasses.replace(packed, batch=wider, weights=weights)


def unpack_weights(
    plan: Plan, stacks: Mapping[str, Stack], gradients: Mapping[str, np.ndarray], num_shards: int
) -> list[np.ndarray | None]:
    """From values [n, N] by stack, laid out as entries, an array a feature parallel to its ids."""
    end = {name: np.zeros(num_shards, np.int64) for name in stacks}
    result: list[np.ndarray | None] = []
    for feature, lookup, live_rows in zip(plan.layout.features, plan.lookups, plan.live_rows, strict=True):
        entries = feature_entries(feature, lookup, stacks[feature.stack], num_shards, live_rows)
        shard = entries.segments // max(feature.num_segments, 1)
        counts = np.bincount(shard, minlength=num_shards)
        first = np.cumsum(counts) - counts
        at = np.arange(shard.size) - first[shard] + end[feature.stack][shard]
        end[feature.stack] += counts
        if lookup.operands.weights is None:
            result.append(None)
            continue
        out = np.zeros(lookup.operands.weights.shape, np.float32)
        out[entries.source] = np.asarray(gradients[feature.stack])[shard, at]
        result.append(out)
    return result


def _with_slots(ids: SparseCoreIds, stack: Stack, layout: BatchLayout, positions, segments) -> SparseCoreIds:
    slots = slots_of(ids, stack, layout.of_stack(stack.name), positions, segments)
    return dataclasses.replace(ids, segments=segments, slots=slots)


def _join(parts, stack: Stack, num_segments: int, num_shards: int, capacity):
    """Positions, segments and weights [num_shards, N] of one stack from those of its features."""
    borders = []
    for feature, entries, _ in parts:
        edges = np.arange(num_shards + 1) * feature.num_segments
        borders.append(np.searchsorted(entries.segments, edges))
    # Dense features have room for all of their ids, bad ones too: a number that all hosts know.
    totals: Any = sum(
        np.full(num_shards, feature.num_segments) if feature.bag.layout == "dense" else np.diff(border)
        for (feature, _, _), border in zip(parts, borders, strict=True)
    )
    shape = (num_shards, capacity(int(totals.max(initial=0))))
    positions = np.full(shape, stack.num_positions, np.int32)
    segments = np.full(shape, num_segments, np.int32)
    weights = None if parts[0][2] is None else np.zeros(shape, np.float32)
    end = np.zeros(num_shards, np.int64)
    for (feature, entries, values), border in zip(parts, borders, strict=True):
        for shard in range(num_shards):
            a, b = border[shard], border[shard + 1]
            to = slice(end[shard], end[shard] + b - a)
            positions[shard, to] = entries.positions[a:b]
            segments[shard, to] = entries.segments[a:b] + (feature.first_segment - shard * feature.num_segments)
            if weights is not None:
                weights[shard, to] = values[a:b]
            end[shard] += b - a
    return positions, segments, weights
