"""Lays a batch out over the shards inside of a trace, where its ids have no values yet."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxembed.inputs.ids import signed_ids

from .batch import ShardedBatch
from .entries import placement_of
from .matching import Plan
from .placement import Stack


def pack_in_trace(plan: Plan, stacks: Mapping[str, Stack], num_shards: int) -> ShardedBatch:
    """As `packing.pack_on_host` where ids are traced, for dense inputs.

    Raises:
      ValueError: for ragged and sparse inputs, whose layout depends on their values.
    """
    positions: dict[str, list] = {name: [] for name in stacks}
    segments: dict[str, list] = {name: [] for name in stacks}
    bad_ids = []
    for feature, lookup, live_rows in zip(plan.layout.features, plan.lookups, plan.live_rows, strict=True):
        if feature.bag.layout != "dense":
            raise ValueError(
                f"Feature {feature.path!r}: a {feature.bag.layout} input cannot be laid out over the devices "
                "inside of a trace; call ShardedEmbedding.shard_batch on the batch before jit."
            )
        stack, size = stacks[feature.stack], num_shards * feature.num_segments
        # V may be more than their own type counts; those of the host may be too wide for a program.
        ids = jnp.asarray(signed_ids(lookup.operands.ids))
        ids = jnp.pad(ids, (0, size - ids.shape[0])).reshape(num_shards, -1)
        real = np.arange(size) < math.prod(feature.output_shape[:-1])
        if live_rows is not None:
            real[: live_rows.size * feature.inner] &= np.repeat(live_rows, feature.inner)
        real = real.reshape(num_shards, -1)
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
