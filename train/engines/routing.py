"""The all_to_all exchange: each shard asks the owners for the rows it needs, and gets just these.

    forward    sort and dedupe the positions; send the rows wanted to their owners; get the values back
    backward   sum the gradients of each position; send these to the owners, which sum them over shards

It moves one row of D each way for each different id that a shard looks up, however many shards there are.
A shard has room for C rows from (or to) each owner in a round. If some shard needs more of one owner, all
agree on the rows of that owner which this round is about, and go round again for the rest: nothing is ever
dropped, and a row's gradients all travel in the same round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxembed.optimizers import dedupe, dedupe_ids

from .placement import Stack
from .segments import add_segments


class Chunk(NamedTuple):
    """What a round brought for the entries of a shard, in their order.

    Attributes:
      values: [N, D], the row of each entry, as `table_rows` gave it.
      valid: [N], whether this round was about the entry.
    """

    values: jax.Array
    valid: jax.Array


class _Route(NamedTuple):
    """Which different positions a shard looks up.

    Attributes:
      unique: int32 [N] ascending, each once, then n R.
      order: int32 [N], sorts the entries by position.
      place: int32 [N], where in `unique` each of the sorted entries is; N for padding.
    """

    unique: jax.Array
    order: jax.Array
    place: jax.Array


class _Round(NamedTuple):
    """Rows [low, high) of each owner: all that one round is about.

    Attributes:
      low: int32 [n], the same on all shards; R where an owner is done.
      first: int32 [n], where in `unique` this shard's rows of each owner from `low` on start.
    """

    low: jax.Array
    first: jax.Array


def for_each_round(
    consume: Callable[[Any, Chunk], Any],
    carry: Any,
    table_rows: Callable[[jax.Array], jax.Array],
    positions: jax.Array,
    stack: Stack,
    axes: tuple[str, ...],
    window: int,
) -> tuple[Any, jax.Array]:
    """Calls `carry = consume(carry, chunk)` until every entry got its row.

    Args:
      consume: see above.
      carry: any pytree.
      table_rows: int32 [n C] rows to [n C, D].
      positions: [N].
      stack: whose positions they are.
      axes: of the mesh.
      window: C.

    Returns:
      The last carry, and how many rounds it took, int32, the same on all shards: 1 unless some shard asks an owner
      for more than C rows.
    """
    route = _Route(*dedupe_ids(positions, stack.num_positions))
    # Place of the entries in their own order.
    place = lax.sort_key_val(route.order, route.place)[1]
    owner = jnp.clip(positions // stack.num_rows, 0, stack.num_shards - 1)

    def body(state):
        now, carry, rounds = state
        rows, high, count = _rows_wanted(route, now, stack, axes, window)
        wanted = lax.all_to_all(rows, axes, 0, 0, tiled=True)
        values = table_rows(wanted.reshape(-1)).reshape(stack.num_shards, window, -1)
        values = lax.all_to_all(values, axes, 0, 0, tiled=True)
        offset = place - now.first[owner]
        valid = (offset >= 0) & (offset < count[owner])
        slot = jnp.where(valid, owner * window + offset, 0)
        values = values.reshape(-1, values.shape[-1])[slot]
        carry = consume(carry, Chunk(values, valid))
        return _Round(high, now.first + count), carry, rounds + 1

    start = (_start(route, stack), carry, jnp.int32(0))
    return lax.while_loop(lambda state: jnp.any(state[0].low < stack.num_rows), body, start)[1:]


def for_each_row(
    update: Callable[[Any, jax.Array, jax.Array], Any],
    carry: Any,
    values_of: Callable[[jax.Array, jax.Array], jax.Array],
    positions: jax.Array,
    stack: Stack,
    axes: tuple[str, ...],
    window: int,
) -> Any:
    """Calls `carry = update(carry, rows, sums)` on the rows of this shard that any shard looked up, each once.

    Args:
      update: takes int32 [n C] rows, ascending, then padding of R, and the float32 [n C, D] sums of their
        entries' gradients.
      carry: any pytree.
      values_of: int32 [N] entries, and bool [N] which of them count, to the [N, D] gradients of their rows,
        zeros for the others.
      positions: [N].
      stack: whose positions they are.
      axes: of the mesh.
      window: C.
    """
    n, size = stack.num_shards, positions.shape[0]
    route = _Route(*dedupe_ids(positions, stack.num_positions))
    sorted_owner = jnp.clip(positions[route.order] // stack.num_rows, 0, n - 1)

    def body(state):
        now, carry = state
        rows, high, count = _rows_wanted(route, now, stack, axes, window)
        offset = route.place - now.first[sorted_owner]
        valid = (offset >= 0) & (offset < count[sorted_owner]) & (route.place < size)
        values = values_of(route.order, valid)
        # Entries that do not count add zeros where the slots stay ascending: unsorted ones cost TPU a sort.
        slot = sorted_owner * window + jnp.clip(offset, 0, window - 1)
        sums = add_segments(jnp.zeros((n * window, values.shape[1]), jnp.float32), values, slot)
        sums = lax.all_to_all(sums.reshape(n, window, -1), axes, 0, 0, tiled=True)
        rows = lax.all_to_all(rows, axes, 0, 0, tiled=True)
        rows, sums = dedupe(rows.reshape(-1), sums.reshape(n * window, -1), stack.num_rows)
        return _Round(high, now.first + count), update(carry, rows, sums)

    return lax.while_loop(
        lambda state: jnp.any(state[0].low < stack.num_rows), body, (_start(route, stack), carry)
    )[1]


def _start(route: _Route, stack: Stack) -> _Round:
    borders = jnp.arange(stack.num_shards, dtype=jnp.int32) * stack.num_rows
    first = jnp.searchsorted(route.unique, borders).astype(jnp.int32)
    return _Round(jnp.zeros(stack.num_shards, jnp.int32), first)


def _rows_wanted(
    route: _Route, now: _Round, stack: Stack, axes: tuple[str, ...], window: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows [n, C] to ask of each owner (padding R), where the round ends, and how many rows they are, [n]."""
    num_rows = stack.num_rows
    base = jnp.arange(stack.num_shards, dtype=jnp.int32) * num_rows
    index = now.first[:, None] + jnp.arange(window + 1, dtype=jnp.int32)
    rows = route.unique.at[index].get(mode="fill", fill_value=stack.num_positions) - base[:, None]
    rows = jnp.where(rows < num_rows, rows, num_rows)
    # A shard with more than C rows of an owner ends the round before the first that has no room.
    high = lax.pmin(rows[:, window], axes)
    rows = rows[:, :window]
    rows = jnp.where(rows < high[:, None], rows, num_rows)
    return rows, high, jnp.sum(rows < num_rows, axis=1, dtype=jnp.int32)
