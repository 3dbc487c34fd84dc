"""Updates of the rows that a batch looked up, at a cost that does not grow with the vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxembed.inputs.ids import signed_ids
from jaxembed.optimizers.base import Optimizer, Slots
from jaxembed.shapes import Ids, Rows, Table

#: Occurrences applied at a time where the gradients of an id are not summed.
_CHUNK = 1024


def sparse_update(
    optimizer: Optimizer,
    table: Table,
    slots: Slots,
    ids: Ids,
    gradients: Rows,
    step: Any,
    *,
    learning_rate: Any = None,
) -> tuple[Table, dict[str, Table]]:
    """One step of the optimizer on one device's table.

    Rows that are not looked up stay as they are, bit by bit, unless the optimizer is not lazy. In a jit with
    the table and slots donated, they are updated in place.

    Args:
      optimizer: its rule and options.
      table: [V, D].
      slots: by name, as of `optimizer.init_slots`.
      ids: [N] rows looked up, in any order, possibly repeated. Those outside [0, V) are padding.
      gradients: [N, D], with respect to the row looked up.
      step: int scalar, 0 at the first update.
      learning_rate: float32 scalar; None takes `optimizer.learning_rate_at(step)`.

    Returns:
      The table and slots, updated.
    """
    num_rows = table.shape[0]
    ids, gradients = _integers(ids), jnp.asarray(gradients)
    if learning_rate is None:
        optimizer = optimizer.with_called_at(step)
        learning_rate = optimizer.learning_rate_at(step)
    if not optimizer.is_lazy:
        ids, gradients = dedupe(ids, gradients, num_rows)
        dense = _put(jnp.zeros(table.shape, jnp.float32), ids, gradients)
        return optimizer.update_rows(dense, table, slots, learning_rate, step)
    if not ids.shape[0]:
        return table, dict(slots)
    if optimizer.use_gradient_accumulation:
        ids, gradients = dedupe(ids, gradients, num_rows)
        return update_unique(optimizer, table, slots, ids, gradients, learning_rate, step)
    return _update_one_by_one(optimizer, table, slots, ids, gradients, learning_rate, step)


def update_unique(
    optimizer: Optimizer,
    table: Table,
    slots: Slots,
    ids: Ids,
    gradients: Rows,
    learning_rate: Any,
    step: Any,
) -> tuple[Table, dict[str, Table]]:
    """Updates the rows `ids`: [N], ascending, each once, then padding of V, as `dedupe` returns them."""
    # Rows that are only added to need not be read: what the rule makes of zeros is added to them.
    is_added = _is_added(optimizer, table)
    rows = jnp.zeros(gradients.shape, table.dtype) if is_added else _take(table, ids)
    row_slots = {name: _take(slots[name], ids) for name in optimizer.slot_names}
    rows, row_slots = optimizer.update_rows(gradients, rows, row_slots, learning_rate, step)
    # Fused into its scatter, TPU's cost analysis counts the rule as reading all V rows. Apart, the count is flat
    # in V, at the price of N new rows and slots in memory.
    rows, row_slots = lax.optimization_barrier((rows, row_slots))
    updated = {name: _put(slots[name], ids, row_slots[name]) for name in optimizer.slot_names}
    return _put(table, ids, rows, is_added), updated


def dedupe(ids: Ids, gradients: Rows, num_rows: int) -> tuple[Ids, Rows]:
    """Sums the gradients of each id.

    A sort and sums over neighbours, so that neither cost nor memory grow with `num_rows`.

    Args:
      ids: [N] integers; those outside [0, num_rows) are dropped.
      gradients: [N, D], summed in float32, in the order of their occurrence.
      num_rows: V.

    Returns:
      unique_ids: [N] int32, the ids ascending, each once, then `num_rows` for the rest.
      summed: float32 [N, D], zero where `unique_ids` is `num_rows`.
    """
    unique_ids, order, segment = dedupe_ids(ids, num_rows)
    gradients = jnp.asarray(gradients).at[order].get(unique_indices=True, wrap_negative_indices=False)
    gradients = gradients.astype(jnp.float32)
    summed = jax.ops.segment_sum(gradients, segment, ids.shape[0], indices_are_sorted=True)
    return unique_ids, summed


def dedupe_ids(ids: Ids, num_rows: int) -> tuple[Ids, Ids, Ids]:
    """The part of `dedupe` that looks at the ids, for gradients that are cheaper to gather in order.

    Args:
      ids: [N] integers; those outside [0, num_rows) are dropped.
      num_rows: V.

    Returns:
      unique_ids: [N] int32, as of `dedupe`.
      order: [N] int32, the permutation that sorts the ids, stable, those to drop last.
      segment: [N] int32 ascending, where in `unique_ids` each of the sorted ids is; N for those to drop.
    """
    size = ids.shape[0]
    ids, order = _sort(_integers(ids), num_rows)
    first = _is_first(ids)
    segment = jnp.where(ids < num_rows, jnp.cumsum(first, dtype=jnp.int32) - 1, size)
    # The firsts are ascending already: a second sort moves them to the front, cheaper than a scatter on TPU.
    return lax.sort(jnp.where(first, ids, num_rows)), order, segment


def _update_one_by_one(
    optimizer: Optimizer,
    table: jax.Array,
    slots: Slots,
    ids: jax.Array,
    gradients: jax.Array,
    learning_rate: Any,
    step: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies first all first occurrences of the ids, then all second ones, and so on.

    The occurrences lie sorted by that rank, and a loop takes the next `_CHUNK` of one rank at a time: R rows
    in all, and at least one chunk a rank.
    """
    size, num_rows = ids.shape[0], table.shape[0]
    chunk = min(size, _CHUNK)
    ids, order = _sort(ids, num_rows)
    position = jnp.arange(size, dtype=jnp.int32)
    rank = position - lax.cummax(jnp.where(_is_first(ids), position, 0))
    rank = jnp.where(ids < num_rows, rank, size)
    rank, ids, order = lax.sort((rank, ids, order), num_keys=2)
    rank = jnp.pad(rank, (0, chunk), constant_values=size)
    ids, order = jnp.pad(ids, (0, chunk), constant_values=num_rows), jnp.pad(order, (0, chunk))
    valid = jnp.sum(rank < size, dtype=jnp.int32)

    def apply_chunk(carry):
        start, table, slots = carry
        ranks, chunk_ids, chunk_order = (lax.dynamic_slice(x, (start,), (chunk,)) for x in (rank, ids, order))
        same = ranks == ranks[0]
        chunk_ids = jnp.where(same, chunk_ids, num_rows)
        table, slots = update_unique(
            optimizer, table, slots, chunk_ids, gradients[chunk_order], learning_rate, step
        )
        return start + jnp.sum(same, dtype=jnp.int32), table, slots

    # Zero of the same kind as `valid`, which varies over the mesh in a shard_map.
    carry = (jnp.zeros_like(valid), table, {name: slots[name] for name in optimizer.slot_names})
    _, table, updated = lax.while_loop(lambda carry: carry[0] < valid, apply_chunk, carry)
    return table, updated


def _integers(ids: Ids) -> jax.Array:
    return jnp.asarray(signed_ids(ids if hasattr(ids, "dtype") else np.asarray(ids)))


def _sort(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    ids = jnp.where((ids >= 0) & (ids < num_rows), ids, num_rows).astype(jnp.int32)
    return lax.sort_key_val(ids, jnp.arange(ids.shape[0], dtype=jnp.int32))


def _is_first(ids: jax.Array) -> jax.Array:
    return jnp.pad(ids[1:] != ids[:-1], (min(ids.shape[0], 1), 0), constant_values=True)


def _take(array: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.asarray(array).at[ids].get(mode="clip", indices_are_sorted=True, wrap_negative_indices=False)


def _is_added(optimizer: Optimizer, table: jax.Array) -> bool:
    """Whether adding the rule's value for a row of zeros gives the same bits as the rule on the row."""
    is_clipped = optimizer.clip_weight_min is not None or optimizer.clip_weight_max is not None
    is_plain = optimizer.is_additive and not optimizer.weight_decay_factor and not is_clipped
    # A narrower row would be rounded twice.
    return is_plain and table.dtype == jnp.float32


def _put(array: jax.Array, ids: jax.Array, values: jax.Array, add: bool = False) -> jax.Array:
    # Ids out of range are dropped, but must differ too for `unique_indices` to be true.
    num_rows = array.shape[0]
    distinct = num_rows + ids.shape[0] < 2**31
    if distinct:
        ids = jnp.where(ids < num_rows, ids, num_rows + jnp.arange(ids.shape[0], dtype=ids.dtype))
    at = jnp.asarray(array).at[ids]
    return (at.add if add else at.set)(
        values.astype(array.dtype),
        mode="drop",
        indices_are_sorted=True,
        unique_indices=distinct,
        wrap_negative_indices=False,
    )
