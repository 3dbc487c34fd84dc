"""The `xla` engine: lookups and updates of one stack on one shard, for any platform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxembed.bag import Bag, BagOperands, embedding_bags
from jaxembed.buckets import simulate_quantization
from jaxembed.optimizers import dedupe, native, sparse_update

from . import gathering, routing
from .batch import FeatureLayout
from .placement import Stack
from .row_kernels import take_rows, update_unique
from .segments import add_segments, scale
from .traffic import pair_window

Axes = tuple[str, ...]
#: Positions and segments, int32 [N] each.
Entries = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class StackExchange:
    """How one stack is looked up and updated in a program; all static.

    Attributes:
      stack: which.
      exchange: "all_gather" or "all_to_all"; of no use to stacks that are not sharded by rows.
      axes: of the mesh.
      num_segments: S, on one shard.
      window: how many rows are taken at a time.
      row_kernels: what reads and updates rows, "xla" or "pallas".
      feature_sizes: the segments of each feature, on one shard; they sum to S.
    """

    stack: Stack
    exchange: str
    axes: Axes
    num_segments: int
    window: int
    row_kernels: str = "xla"
    feature_sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class XlaEngine:
    """Looks one stack up on one shard, and updates it.

    Entries are positions and segments, int32 [N] each; weights are float32 [N], or None.

    Args:
      exchange: how.
      features: of the stack.
    """

    exchange: StackExchange
    features: tuple[FeatureLayout, ...]

    def look_up(self, table: jax.Array, entries: Entries, weights: Any) -> tuple[jax.Array, jax.Array]:
        """The sums of a shard's segments times the combiner's scale, float32 [S, D], and `look_up`'s rounds."""
        weights, scales = scale(self.features, entries[1], weights)
        sums, rounds = look_up(self.exchange, table, *entries, weights)
        return _times(sums, scales), rounds

    def update(
        self,
        table: jax.Array,
        slots: dict[str, jax.Array],
        entries: Entries,
        weights: Any,
        gradients: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One optimizer step, from the float32 [S, D] gradients of what `look_up` returned."""
        weights, scales = scale(self.features, entries[1], weights)
        return update(self.exchange, table, slots, *entries, weights, _times(gradients, scales), step)

    def table_gradient(
        self, shape: tuple[int, ...], entries: Entries, weights: Any, gradients: jax.Array
    ) -> jax.Array:
        """The gradient of a shard's whole piece, float32 [R, D]."""
        weights, scales = scale(self.features, entries[1], weights)
        return sum_gradients(self.exchange, shape, *entries, weights, _times(gradients, scales))[0]

    def weight_gradient(
        self, table: jax.Array, entries: Entries, weights: Any, gradients: jax.Array
    ) -> jax.Array:
        """The gradient of each entry's weight, float32 [N]."""
        positions, segments = entries
        (scaled, scales), transpose = jax.vjp(lambda weights: scale(self.features, segments, weights), weights)
        direct = one_to_one(self.exchange, positions.shape[0])
        found = weight_gradients(direct, table, positions, segments, _times(gradients, scales))
        if scales is None:
            return found
        sums, _ = look_up(self.exchange, table, positions, segments, scaled)
        return transpose((found, jnp.sum(gradients * sums, axis=1)))[0]


def one_to_one(ex: StackExchange, capacity: int) -> StackExchange:
    """The exchange in which every entry is a segment of its own: only all_to_all moves no more than that."""
    if ex.stack.kind != "row":
        return ex
    return dataclasses.replace(ex, exchange="all_to_all", window=pair_window(capacity, ex.stack.num_shards))


def is_routed(ex: StackExchange) -> bool:
    """Whether rows travel by all_to_all."""
    return ex.stack.kind == "row" and ex.exchange == "all_to_all"


def look_up(
    ex: StackExchange, table: jax.Array, positions: jax.Array, segments: jax.Array, weights: Any
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of a shard's segments.

    Args:
      ex: how.
      table: this shard's piece.
      positions: [N].
      segments: [N].
      weights: [N], or None.

    Returns:
      The sums, float32 [S, D], and how many rounds of all_to_all they took, int32, the same on all shards: 0 where
      rows do not travel so.
    """
    stack, alone = ex.stack, jnp.int32(0)

    def stored(rows):
        return take_rows(ex.row_kernels, table, rows)

    def decoded(values):
        # Gradients pass it straight through: those below are of the rows themselves.
        quantization = stack.quantization
        if quantization is not None and quantization.num_buckets > 256 and values.dtype != jnp.float32:
            # No codes stand for these: they are served as rows of the table's type, so rounded to it. Without the
            # barrier a compiler may leave out a conversion to 16 bits and back.
            return lax.optimization_barrier(simulate_quantization(values, quantization)).astype(jnp.float32)
        values = values.astype(jnp.float32)
        return values if quantization is None else simulate_quantization(values, quantization)

    def rows_of(rows):
        return decoded(stored(rows))

    if stack.num_shards == 1 and stack.quantization is None and table.dtype == jnp.float32:
        # Nothing is exchanged: one bag a segment, which has a kernel of its own on CPU.
        bag = Bag("sparse", ex.num_segments)
        (sums,), _ = embedding_bags([bag], [BagOperands(table, positions, segments, None, weights)])
        return sums, alone
    zeros = jnp.zeros((ex.num_segments, stack.dim), jnp.float32)
    if stack.kind == "replicated" or stack.num_shards == 1:
        values = rows_of(positions)
        values = values if weights is None else values * weights[:, None]
        return add_segments(zeros, values, segments), alone
    if is_routed(ex):

        def add(sums, chunk):
            # Rows travel in the type of their table.
            values = decoded(chunk.values)
            values = values if weights is None else values * weights[:, None]
            return add_segments(sums, values, jnp.where(chunk.valid, segments, ex.num_segments), False)

        return routing.for_each_round(add, zeros, stored, positions, stack, ex.axes, ex.window)
    owned = _owned(ex, positions, segments, weights)
    sums = jnp.zeros((stack.num_shards * ex.num_segments, table.shape[1]), jnp.float32)
    sums = gathering.sum_owned(rows_of, owned, sums, stack.num_rows, ex.window)
    if stack.kind == "column":
        return lax.all_to_all(sums, ex.axes, 0, 1, tiled=True), alone
    return lax.psum_scatter(sums, ex.axes, scatter_dimension=0, tiled=True), alone


def update(
    ex: StackExchange,
    table: jax.Array,
    slots: dict[str, jax.Array],
    positions: jax.Array,
    segments: jax.Array,
    weights: Any,
    gradients: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One optimizer step on a shard's piece, from the float32 [S, D] gradients of its segments' sums."""
    stack, optimizer = ex.stack, ex.stack.optimizer
    learning_rate = optimizer.learning_rate_at(step)
    if stack.num_shards == 1:
        return _update_alone(ex, table, slots, positions, segments, weights, gradients, learning_rate, step)
    if stack.kind == "replicated" or not optimizer.is_lazy:
        summed, touched = sum_gradients(ex, table.shape, positions, segments, weights, gradients)
        rows, new_slots = optimizer.update_rows(summed, table, slots, learning_rate, step)
        if not optimizer.is_lazy:
            return rows, new_slots
        return _where(touched, rows, table), {k: _where(touched, new_slots[k], slots[k]) for k in slots}
    if not optimizer.use_gradient_accumulation:
        owned = _owned(ex, positions, segments, weights)
        if len(ex.feature_sizes) > 1:
            owned = gathering.feature_after_feature(owned, ex.feature_sizes, stack.num_shards)
        rows_gradients = _own_columns(ex, gradients).at[owned.segments].get(mode="fill", fill_value=0)
        if owned.weights is not None:
            rows_gradients = rows_gradients * owned.weights[:, None]
        return sparse_update(
            optimizer, table, slots, owned.rows, rows_gradients, step, learning_rate=learning_rate
        )

    def apply(carry: tuple[Any, Any], rows, sums):
        return update_unique(ex.row_kernels, optimizer, *carry, rows, sums, learning_rate, step)

    return _for_each_row(ex, apply, (table, slots), positions, segments, weights, gradients)


def _update_alone(ex, table, slots, positions, segments, weights, gradients, learning_rate, step):
    """The update where there is one shard: without exchange, and without a loop that would copy the table."""
    optimizer = ex.stack.optimizer

    def portable(table, slots, positions, segments, weights, gradients, learning_rate, step):
        values = gradients.at[segments].get(mode="fill", fill_value=0)
        values = values if weights is None else values * weights[:, None]
        if by_kernel:
            rows, sums = dedupe(positions, values, table.shape[0])
            return update_unique(ex.row_kernels, optimizer, table, slots, rows, sums, learning_rate, step)
        return sparse_update(optimizer, table, slots, positions, values, step, learning_rate=learning_rate)

    by_kernel = ex.row_kernels == "pallas"
    arguments = (table, slots, positions, segments, weights, gradients, learning_rate, step)
    if by_kernel or not native.supports(optimizer, table):
        return portable(*arguments)
    return lax.platform_dependent(
        *arguments,
        cpu=lambda *arguments: native.update_entries(optimizer, *arguments[:-1]),
        default=portable,
    )


def sum_gradients(
    ex: StackExchange, shape: tuple[int, ...], positions: Any, segments: Any, weights: Any, gradients: Any
) -> tuple[jax.Array, jax.Array]:
    """The gradient of a shard's whole piece, float32 [R, D], and which rows the batch looked up, bool [R].

    For small tables, optimizers that update every row, and differentiation; the cost is that of the table.
    """
    zeros = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32)
    if ex.stack.kind == "replicated":
        values = gradients.at[segments].get(mode="fill", fill_value=0)
        values = values if weights is None else values * weights[:, None]
        summed, count = (
            zeros[0].at[positions].add(values, mode="drop"),
            zeros[1].at[positions].add(1, mode="drop"),
        )
        return lax.psum(summed, ex.axes), lax.psum(count, ex.axes) > 0

    def put(carry, rows, sums):
        return carry[0].at[rows].add(sums, mode="drop"), carry[1].at[rows].add(1, mode="drop")

    summed, count = _for_each_row(ex, put, zeros, positions, segments, weights, gradients)
    return summed, count > 0


def weight_gradients(
    ex: StackExchange, table: jax.Array, positions: jax.Array, segments: jax.Array, gradients: jax.Array
) -> jax.Array:
    """The gradient of each entry's weight, float32 [N]: its row times the gradient of its segment's sum."""
    # A lookup in which every entry is a segment of its own gives the rows themselves.
    size = positions.shape[0]
    own = jnp.arange(size, dtype=jnp.int32)
    rows, _ = look_up(dataclasses.replace(ex, num_segments=size), table, positions, own, None)
    return jnp.sum(rows * gradients.at[segments].get(mode="fill", fill_value=0), axis=1)


def _for_each_row(ex, function, carry, positions, segments, weights, gradients):
    stack = ex.stack
    if is_routed(ex):
        # A row of zeros to read is cheaper than zeros put in place of what was read.
        padded = jnp.pad(gradients, ((0, 8), (0, 0)))

        def values_of(order, valid):
            segment = jnp.where(valid, segments[order], ex.num_segments)
            values = padded.at[segment].get(mode="clip", wrap_negative_indices=False)
            return values if weights is None else values * jnp.where(valid, weights[order], 0)[:, None]

        return routing.for_each_row(function, carry, values_of, positions, stack, ex.axes, ex.window)
    owned = _owned(ex, positions, segments, weights)
    return gathering.for_each_owned_row(
        function, carry, owned, _own_columns(ex, gradients), stack.num_rows, ex.window
    )


def _own_columns(ex: StackExchange, gradients: jax.Array) -> jax.Array:
    """The gradients of all shards' segments, [n S, D], or this shard's columns of them."""
    if ex.stack.kind == "column":
        return lax.all_to_all(gradients, ex.axes, 1, 0, tiled=True)
    return lax.all_gather(gradients, ex.axes, tiled=True)


def _owned(ex, positions, segments, weights):
    return gathering.gather_entries(
        positions, segments, weights, ex.stack.num_rows, ex.num_segments, ex.axes, ex.stack.kind == "row"
    )


def _times(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    return values if scales is None else values * scales[:, None]


def _where(touched: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(touched.reshape(-1, *[1] * (new.ndim - 1)), new, old)
