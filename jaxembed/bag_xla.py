"""The portable path of embedding_bag: gather and segment_sum in plain JAX, on any backend."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxembed.quantized_table import QuantizedTable

if TYPE_CHECKING:
    from jaxembed.bag import Bag, BagOperands


def embedding_bags(
    bags: Sequence["Bag"], operands: Sequence["BagOperands"]
) -> tuple[list[jax.Array], jax.Array]:
    """As `jaxembed.bag.embedding_bags`, in plain JAX."""
    pairs = [embedding_bag(bag, op) for bag, op in zip(bags, operands, strict=True)]
    counts = [bad_ids for _, bad_ids in pairs]
    return [out for out, _ in pairs], jnp.stack(counts) if counts else jnp.zeros(0, jnp.int32)


def embedding_bag(bag: "Bag", operands: "BagOperands") -> tuple[jax.Array, jax.Array]:
    """One embedding_bag; see `jaxembed.bag` for its semantics.

    Returns:
      [B, D] (or [B, L, D], or [N, D] for the dense layout) in the table's type, and the int32 count of
      bad ids.
    """
    table = operands.table
    entries = _entries(bag, operands)
    rows = _rows(table, operands.ids)
    return _combine(bag, entries, rows).astype(table.dtype), entries.bad_ids


def row_gradients(bag: "Bag", operands: "BagOperands", gradient: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient of one embedding_bag with respect to its table, as rows; see `jaxembed.bag`."""
    vocabulary_size, dim = operands.table.shape
    entries = _entries(bag, operands)
    rows = jax.ShapeDtypeStruct((entries.keep.shape[0], dim), jnp.float32)
    (gradients,) = jax.linear_transpose(partial(_combine, bag, entries), rows)(gradient.astype(jnp.float32))
    ids = jnp.asarray(operands.ids)
    # A vocabulary that the type of the ids cannot count has no ids outside of it that are not negative.
    padding = min(vocabulary_size, jnp.iinfo(ids.dtype).max)
    return jnp.where(entries.keep, ids, padding), gradients


class _Entries(NamedTuple):
    """Entries [N]: bag, position in it, whether they count, float32 weights (or None); and how many are bad."""

    row: Any
    column: Any
    keep: jax.Array
    weights: Any
    bad_ids: jax.Array


def _entries(bag: "Bag", operands: "BagOperands") -> _Entries:
    ids = jnp.asarray(operands.ids)
    row, live, column = _place(bag, operands, ids.shape[0])
    weights = None
    if operands.weights is not None and not bag.sequence_length and bag.layout != "dense":
        weights = jnp.asarray(operands.weights).astype(jnp.float32)
    if bag.prune_ids:
        live &= ids >= 0
    if bag.prune_weights and weights is not None:
        live &= weights > 0
    in_range = (ids >= 0) & (ids < operands.table.shape[0])
    bad_ids = jnp.sum(live & ~in_range, dtype=jnp.int32)
    return _Entries(row, column, live & in_range, weights, bad_ids)


def _combine(bag: "Bag", entries: _Entries, rows: jax.Array) -> jax.Array:
    """[N, D] rows to the float32 output."""
    row, column, keep, weights, _ = entries
    # `where` after the gather, since 0 * NaN of an unrelated row would leak into the sum.
    rows = jnp.where(keep[:, None], rows, 0)
    if bag.layout == "dense":
        return rows
    row = jnp.where(keep, row, bag.num_bags)
    if bag.sequence_length:  # by two indices, as int32 may not hold row * L + column
        return _added((bag.num_bags, bag.sequence_length), (row, column), rows)
    return _weighted(bag, rows, row, weights, keep)


def _weighted(bag: "Bag", rows: Any, row: Any, weights: Any, keep: Any) -> jax.Array:
    given = weights is not None
    weights = jnp.where(keep, weights, 0) if given else keep.astype(jnp.float32)
    divisor = None
    if bag.combiner == "mean":
        divisor = _segment_sum(weights, row, bag.num_bags)
        if given:  # XLA flushes the reciprocal of a large divisor, its square, or a gradient times it to zero.
            scale = jnp.where(jnp.abs(divisor) > 2.0**32, 2.0**-80, 1.0).astype(jnp.float32)
            weights *= jnp.append(scale, jnp.float32(1)).at[row].get(mode="clip")
            divisor *= scale
    elif bag.combiner == "sqrtn":
        squares = _segment_sum(weights * weights, row, bag.num_bags)
        divisor = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), squares)
    total = _segment_sum(rows * weights[:, None], row, bag.num_bags)
    if divisor is None:
        return total
    zero = divisor == 0
    return jnp.where(zero[:, None], 0, total / jnp.where(zero, 1, divisor)[:, None])


def _place(bag: "Bag", operands: "BagOperands", num_ids: Any) -> tuple[Any, Any, Any]:
    """The bag of each entry, whether it is one (not padding, not truncated), and its position in it."""
    if bag.layout == "dense":
        return None, jnp.ones(num_ids, bool), None
    bags = jnp.asarray(operands.bags)
    if bag.layout == "sparse":
        row, column = bags, operands.columns
        live = (row >= 0) & (row < bag.num_bags)
        if bag.sequence_length:
            column = jnp.asarray(column)
            live &= (column >= 0) & (column < bag.sequence_length)
        return row, live, column
    # Row of position n = number of splits <= n, less one; a cumulative sum of marks, since
    # searchsorted does not export with symbolic sizes.
    position = jnp.arange(num_ids, dtype=bags.dtype)
    marks = jnp.zeros(num_ids, bags.dtype).at[bags].add(1, mode="drop")
    row = jnp.cumsum(marks, dtype=bags.dtype) - 1
    live = (row >= 0) & (row < bag.num_bags)
    column = None
    if bag.sequence_length:
        column = position - bags.at[row].get(mode="clip")
        live &= column < bag.sequence_length
    return row, live, column


def _rows(table: Any, ids: jax.Array) -> jax.Array:
    if not table.shape[0]:  # which nothing can be gathered from; no id is one of its rows
        return jnp.zeros((ids.shape[0], table.shape[1]), jnp.float32)
    if isinstance(table, QuantizedTable):
        return table.rows(ids)
    table = jnp.asarray(table)
    if table.dtype.itemsize < 4:
        return _widened_rows(table, ids)
    return _gathered(table, ids).astype(jnp.float32)


def _gathered(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].get(mode="clip", wrap_negative_indices=False)


@jax.custom_jvp
def _widened_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return _gathered(table, ids).astype(jnp.float32)


def _widened_tangent(primals, tangents):
    """Widens before it gathers: the transpose then adds in float32 and rounds once, where bfloat16 would count to 256."""
    (table, ids), (tangent, _) = primals, tangents
    rows = _widened_rows(table, ids)
    if isinstance(tangent, SymbolicZero):
        return rows, jnp.zeros_like(rows)
    return rows, _gathered(tangent.astype(jnp.float32), ids)


_widened_rows.defjvp(_widened_tangent, symbolic_zeros=True)


def _segment_sum(values: jax.Array, segment: jax.Array, num_segments: int) -> jax.Array:
    return _added((num_segments,), (segment,), values)


def _added(shape: tuple[Any, ...], place: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
    """Zeros [*shape, ...] with each of the values [N, ...] added at its place: N indices by axis of the shape."""
    spare = shape[0] == 0  # Gradients are gathered, and nothing can be gathered from no segments.
    zeros = jnp.zeros((1 if spare else shape[0], *shape[1:], *values.shape[1:]), values.dtype)
    out = zeros.at[place].add(values, mode="drop", wrap_negative_indices=False)
    return out[:0] if spare else out
