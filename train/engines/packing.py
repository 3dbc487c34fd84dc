"""Lays a batch out over the shards: on the host where its arrays are there, else inside the trace."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.features import FeatureInput, match
from jaxembed.inputs.ids import is_concrete
from jaxembed.lookup import Lookup, plan_lookup

from .batch import BatchLayout, FeatureLayout, PackedBatch, ShardedBatch, Skeleton, inner_size
from .custom import as_sequence, is_custom
from .placement import Stack, TablePlacement
from .sparsecore import SparseCoreIds
from .sparsecore_packing import Part, SparseCorePacking, slots_of


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


class Plan(NamedTuple):
    """A batch matched to its stacks: what is static of it, and the inputs."""

    layout: BatchLayout
    items: list[FeatureInput]
    lookups: list[Lookup]


def plan_batch(
    inputs: Any, weights: Any, feature_config: Any, stacks: Mapping[str, Stack], num_hosts: int = 1
) -> Plan:
    """Matches inputs and weights to the stacks.

    Args:
      inputs: the rows of this host, out of `num_hosts` equal ones.
      weights: like `inputs`.
      feature_config: of the tables.
      stacks: by name.
      num_hosts: how many hosts share a batch.

    Raises:
      ValueError: as `serving_embedding_lookup`, or if the rows do not divide over a host's shards where
        there are several hosts.
    """
    stack_of = {p.table.name: stack for stack in stacks.values() for p in stack.placements}
    segments = dict.fromkeys(stacks, 0)
    features, lookups = [], []
    items = match(inputs, weights, feature_config)
    for item in items:
        lookup, combined = plan_lookup(item, None), None
        stack = stack_of[item.feature.table.name]
        num_rows = lookup.bag.num_bags if lookup.bag.layout == "ragged" else (item.ids.shape or (1,))[0]
        inner = inner_size(lookup.bag, item.ids)
        if is_custom(lookup):
            combiner: Any = lookup.bag.combiner
            inner *= combiner.max_valency
            combined = (lookup.output_shape[0] * num_hosts, *lookup.output_shape[1:])
            lookup = as_sequence(lookup)
        num_shards, shape = stack.num_shards // num_hosts, lookup.output_shape
        cores = max(stack.cores, 1)
        # A batch without rows keeps one place a shard: collectives of nothing do not compile.
        size = max(-(-num_rows // (num_shards * cores)) * inner, 1) * cores
        if num_hosts > 1:
            if num_rows % (num_shards * cores):
                what = f"{num_shards * cores} {'SparseCores' if stack.cores else 'shards'}"
                raise ValueError(
                    f"Feature {item.path!r} has {num_rows} rows on this host; with several hosts they must be a "
                    f"multiple of its {what}: drop or pad the last batch."
                )
            shape = (shape[0] * num_hosts, *shape[1:])
        features.append(
            FeatureLayout(
                item.path,
                item.feature,
                lookup.bag,
                num_rows * num_hosts,
                inner,
                shape,
                stack.name,
                segments[stack.name],
                size,
                combined,
            )
        )
        segments[stack.name] += size
        lookups.append(lookup)
    return Plan(BatchLayout(Skeleton(inputs), tuple(features)), items, lookups)


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
    for index, (feature, lookup) in enumerate(zip(plan.layout.features, plan.lookups, strict=True)):
        stack = stacks[feature.stack]
        entries = feature_entries(feature, lookup, stack, len(shards))
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
    batch = ShardedBatch(positions, segments, on_sparsecores, bad_ids, plan.layout)
    needs_agreement = any(feature.bag.layout != "dense" for feature in plan.layout.features)
    return PackedBatch(batch, values if weighted else None, needs_agreement)


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


def _with_slots(ids: SparseCoreIds, stack: Stack, layout: BatchLayout, positions, segments) -> SparseCoreIds:
    slots = slots_of(ids, stack, layout.of_stack(stack.name), positions, segments)
    return dataclasses.replace(ids, segments=segments, slots=slots)


def feature_entries(feature: FeatureLayout, lookup: Lookup, stack: Stack, num_shards: int) -> Entries:
    """The entries of a feature; the inputs hold the rows of `num_shards` shards."""
    bag, operands = lookup.bag, lookup.operands
    ids = np.asarray(operands.ids).reshape(-1)
    source, segments = _segments(feature, lookup, ids.size)
    live = np.ones(source.size, bool)
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
    bags = np.asarray(operands.bags)
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
    segments = bags.astype(np.int64)
    if length:
        column = np.asarray(operands.columns)
        live &= (column >= 0) & (column < length)
        segments = segments * length + column
    source = np.flatnonzero(live)
    return source, segments[source]


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


def unpack_weights(
    plan: Plan, stacks: Mapping[str, Stack], gradients: Mapping[str, np.ndarray], num_shards: int
) -> list[np.ndarray | None]:
    """From values [n, N] by stack, laid out as entries, an array a feature parallel to its ids."""
    end = {name: np.zeros(num_shards, np.int64) for name in stacks}
    result: list[np.ndarray | None] = []
    for feature, lookup in zip(plan.layout.features, plan.lookups, strict=True):
        entries = feature_entries(feature, lookup, stacks[feature.stack], num_shards)
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


def pack_in_trace(plan: Plan, stacks: Mapping[str, Stack], num_shards: int) -> ShardedBatch:
    """As `pack_on_host` where ids are traced, for dense inputs.

    Raises:
      ValueError: for ragged and sparse inputs, whose layout depends on their values.
    """
    positions: dict[str, list] = {name: [] for name in stacks}
    segments: dict[str, list] = {name: [] for name in stacks}
    bad_ids = []
    for feature, lookup in zip(plan.layout.features, plan.lookups, strict=True):
        if feature.bag.layout != "dense":
            raise ValueError(
                f"Feature {feature.path!r}: a {feature.bag.layout} input cannot be laid out over the devices "
                "inside of a trace; call ShardedEmbedding.shard_batch on the batch before jit."
            )
        stack, size = stacks[feature.stack], num_shards * feature.num_segments
        ids = jnp.asarray(lookup.operands.ids)
        ids = jnp.pad(ids, (0, size - ids.shape[0])).reshape(num_shards, -1)
        real = (np.arange(size) < math.prod(feature.output_shape[:-1])).reshape(num_shards, -1)
        keep = (ids >= 0) & (ids < feature.feature.table.vocabulary_size)
        bad_ids.append(jnp.sum(real & ~keep, axis=1, dtype=jnp.int32))
        position = stack.position(placement_of(stack, feature), ids.astype(jnp.int32))
        positions[feature.stack].append(jnp.where(real & keep, position, stack.num_positions))
        segment = np.arange(feature.num_segments, dtype=np.int32) + feature.first_segment
        segments[feature.stack].append(jnp.broadcast_to(segment, ids.shape))
    return ShardedBatch(
        {name: jnp.concatenate(parts, axis=1) for name, parts in positions.items() if parts},
        {name: jnp.concatenate(parts, axis=1) for name, parts in segments.items() if parts},
        {},
        jnp.stack(bad_ids, axis=1),
        plan.layout,
    )


def is_traced(plan: Plan) -> bool:
    """Whether an array of the batch is inside of a trace."""
    return not all(
        is_concrete(leaf) for item in plan.items for leaf in jax.tree.leaves((item.ids, item.weights))
    )


def placement_of(stack: Stack, feature: FeatureLayout) -> TablePlacement:
    """Where the table of a feature lies in its stack."""
    return next(p for p in stack.placements if p.table.name == feature.feature.table.name)
