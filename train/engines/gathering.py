"""The all_gather exchange: every shard sees all entries and sums up the rows that it holds.

    forward    all_gather entries; sum own rows into the segments of all shards; psum_scatter the sums
    backward   all_gather entries and gradients of the sums; sum up those of own rows, row by row

It moves n S rows of D a step each way, whatever the number of ids in a bag. The entries that a shard owns
are taken `window` at a time, as often as there are any, so that no row is looked up that is not owned,
none is ever dropped, and memory stays bounded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxembed.optimizers import dedupe_ids

from .segments import add_segments

Axes = tuple[str, ...]


class Owned(NamedTuple):
    """All entries, as one shard sees them.

    Attributes:
      rows: int32 [n N], the row of this shard; R where it has none for the entry.
      segments: int32 [n N] into the segments of all shards, [n S].
      weights: float32 [n N], or None.
    """

    rows: jax.Array
    segments: jax.Array
    weights: Any


def gather_entries(
    positions: jax.Array,
    segments: jax.Array,
    weights: Any,
    num_rows: int,
    num_segments: int,
    axes: Axes,
    is_row: bool,
) -> Owned:
    """All shards' entries, seen by this one.

    Args:
      positions: [N].
      segments: [N].
      weights: [N], or None.
      num_rows: R.
      num_segments: S.
      axes: of the mesh, over which to gather.
      is_row: whether a shard owns R positions out of n R; else all of them.
    """
    positions = lax.all_gather(positions, axes)
    n = positions.shape[0]
    source = jnp.arange(n, dtype=jnp.int32)[:, None]
    segments = lax.all_gather(segments, axes)
    segments = jnp.where(segments < num_segments, segments + source * num_segments, n * num_segments)
    rows = positions - lax.axis_index(axes) * num_rows if is_row else positions
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    if weights is not None:
        weights = lax.all_gather(weights, axes, tiled=True)
    return Owned(rows.reshape(-1), segments.reshape(-1), weights)


def feature_after_feature(owned: Owned, sizes: tuple[int, ...], num_shards: int) -> Owned:
    """The entries in the order of a mesh of one shard: feature after feature, each by its batch rows.

    Gathered, they lie shard after shard, so that their order depends on the mesh. That of an update that applies
    the occurrences of an id one by one must not.

    Args:
      owned: entries in the order of `gather_entries`.
      sizes: segments S_f of each feature, on one shard.
      num_shards: n.
    """
    ends = np.cumsum(sizes, dtype=np.int32)
    first = ends - np.asarray(sizes, np.int32)
    shard, local = owned.segments // ends[-1], owned.segments % ends[-1]
    feature = jnp.searchsorted(ends, local, side="right")
    # n S_g segments of each feature g before f, S_f of each shard before; padding may come anywhere.
    key = (
        local + jnp.asarray(first * (num_shards - 1))[feature] + shard * jnp.asarray(sizes, jnp.int32)[feature]
    )
    _, order = lax.sort_key_val(key, jnp.arange(key.shape[0], dtype=jnp.int32), is_stable=True)
    return jax.tree.map(lambda x: x[order], owned)


def sum_owned(
    table_rows: Callable[[jax.Array], jax.Array], owned: Owned, sums: jax.Array, num_rows: int, window: int
) -> jax.Array:
    """Adds the weighted rows that this shard owns to `sums`.

    Args:
      table_rows: int32 [C] rows to float32 [C, D].
      owned: entries.
      sums: float32 [n S, D].
      num_rows: R.
      window: C.
    """
    mine = owned.rows < num_rows
    count = jnp.sum(mine, dtype=jnp.int32)
    size = mine.shape[0]
    # Owned entries first, in their order, that of their segments.
    key = jnp.where(mine, 0, size) + jnp.arange(size, dtype=jnp.int32)
    order = _pad(lax.sort(key), window, size)

    def add(carry):
        start, sums = carry
        chosen = lax.dynamic_slice(order, (start,), (window,))
        rows = _take(owned.rows, chosen, num_rows)
        segments = jnp.where(rows < num_rows, _take(owned.segments, chosen, 0), sums.shape[0])
        values = table_rows(rows)
        if owned.weights is not None:
            values = values * _take(owned.weights, chosen, 0)[:, None]
        return start + window, add_segments(sums, values, segments)

    return lax.while_loop(lambda carry: carry[0] < count, add, (jnp.int32(0), sums))[1]


def for_each_owned_row(
    update: Callable[[Any, jax.Array, jax.Array], Any],
    carry: Any,
    owned: Owned,
    gradients: jax.Array,
    num_rows: int,
    window: int,
) -> Any:
    """Calls `carry = update(carry, rows, sums)` on the rows that this shard owns, each once.

    Args:
      update: takes int32 [C] rows, ascending, then padding of R, and the float32 [C, D] sums of their
        entries' gradients.
      carry: any pytree.
      owned: entries.
      gradients: float32 [n S, D], of all segments.
      num_rows: R.
      window: C.
    """
    unique, order, place = dedupe_ids(owned.rows, num_rows)
    size = order.shape[0]
    num_unique = jnp.sum(unique < num_rows, dtype=jnp.int32)
    unique = _pad(unique, window, num_rows)
    never = 2**30  # far from every window: entries that are not owned
    order, place = _pad(order, window, size), _pad(jnp.where(place < size, place, never), window, never)

    def window_of_rows(carry):
        first, start, carry = carry

        def add(carry):
            start, _, sums = carry
            chosen = lax.dynamic_slice(order, (start,), (window,))
            places = lax.dynamic_slice(place, (start,), (window,)) - first
            values = _take(gradients, _take(owned.segments, chosen, 0), 0)
            if owned.weights is not None:
                values = values * _take(owned.weights, chosen, 0)[:, None]
            inside = (places >= 0) & (places < window)
            sums = add_segments(sums, values, jnp.where(inside, places, window))
            done = jnp.sum(inside, dtype=jnp.int32)
            return start + done, done == window, sums

        zeros = jnp.zeros((window, gradients.shape[1]), jnp.float32)
        start, _, sums = lax.while_loop(lambda carry: carry[1], add, (start, jnp.bool_(True), zeros))
        rows = lax.dynamic_slice(unique, (first,), (window,))
        return first + window, start, update(carry, rows, sums)

    carry = (jnp.int32(0), jnp.int32(0), carry)
    return lax.while_loop(lambda carry: carry[0] < num_unique, window_of_rows, carry)[2]


def _pad(array: jax.Array, count: int, value: Any) -> jax.Array:
    return jnp.pad(array, (0, count), constant_values=value)


def _take(array: jax.Array, index: jax.Array, fill: Any) -> jax.Array:
    return array.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)
