"""The `sparsecore` engine: lookups and updates of one stack by jax-tpu-embedding's primitives.

On a TPU, SparseCores fetch the rows and apply the optimizer's own rule to them. Elsewhere, and where gradients
with respect to tables or weights are asked for, the same preprocessed ids are read by the `xla` engine.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import xla
from .batch import FeatureLayout
from .segments import scale
from .sparsecore_order import SampleOrder

#: Names of optimizer functions in a compiled program must differ.
_CALLS = itertools.count()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseCoreIds:
    """What SparseCores get of a batch, for one stack: [n, ...] over the shards, or one shard's.

    The entries of a SparseCore's samples follow each other by the SparseCore that holds their row, each such
    partition from a multiple of 8 on, as jax-tpu-embedding's preprocessing lays them out.

    Attributes:
      row_pointers: int32 [n, C P], where each partition ends.
      embedding_ids: int32 [n, M], row on its SparseCore.
      sample_ids: int32 [n, M], sample of this SparseCore (`sparsecore_order`).
      gains: float32 [n, M], what a row is multiplied with where all weights are 1: the combiner's divisor.
      segments: int32 [n, N] of the batch's entries, ascending, where there are weights.
      slots: int32 [n, N], which of the M places each of those is in; several may share one.
      max_ids: of a partition.
      max_unique_ids: likewise, each id once.
    """

    row_pointers: Any
    embedding_ids: Any
    sample_ids: Any
    gains: Any
    segments: Any
    slots: Any
    max_ids: int = dataclasses.field(metadata={"static": True})
    max_unique_ids: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class SparseCoreEngine:
    """Looks one stack up on one shard, and updates it; as `xla.XlaEngine`.

    Args:
      exchange: of the `xla` engine, for what SparseCores do not do.
      features: of the stack.
    """

    exchange: xla.StackExchange
    features: tuple[FeatureLayout, ...]

    def look_up(self, table: jax.Array, ids: SparseCoreIds, weights: Any) -> tuple[jax.Array, jax.Array]:
        """The sums of a shard's segments times the combiner's scale, float32 [S, W], and no rounds."""
        gains = self._gains(ids, weights)
        programs = {"tpu": self._look_up_on_tpu, "default": self._look_up_on_xla}
        return lax.platform_dependent(table, ids, gains, **programs), jnp.int32(0)

    def update(
        self,
        table: jax.Array,
        slots: dict[str, jax.Array],
        ids: SparseCoreIds,
        weights: Any,
        gradients: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One optimizer step, from the float32 [S, W] gradients of what `look_up` returned."""
        args = (table, slots, ids, self._gains(ids, weights), gradients, step)
        return lax.platform_dependent(*args, tpu=self._update_on_tpu, default=self._update_on_xla)

    def table_gradient(
        self, shape: tuple[int, ...], ids: SparseCoreIds, weights: Any, gradients: jax.Array
    ) -> jax.Array:
        """The gradient of a shard's whole piece, float32 [R, W]."""
        positions, segments, gains, _ = self._entries(ids, self._gains(ids, weights))
        return xla.sum_gradients(self.exchange, shape, positions, segments, gains, gradients)[0]

    def weight_gradient(
        self, table: jax.Array, ids: SparseCoreIds, weights: jax.Array, gradients: jax.Array
    ) -> jax.Array:
        """The gradient of each entry's weight, float32 [N]."""
        gains, transpose = jax.vjp(functools.partial(self._gains, ids), weights)
        positions, segments, _, order = self._entries(ids, gains)
        direct = xla.one_to_one(self.exchange, positions.shape[0])
        by_entry = xla.weight_gradients(direct, table, positions, segments, gradients)
        return transpose(jnp.zeros_like(gains).at[order].set(by_entry, unique_indices=True))[0]

    def _gains(self, ids: SparseCoreIds, weights: Any) -> jax.Array:
        if weights is None:
            return ids.gains
        weights, scales = scale(self.features, ids.segments, weights)
        if scales is not None:
            weights = weights * scales.at[ids.segments].get(mode="fill", fill_value=0)
        return jnp.zeros(ids.gains.shape, jnp.float32).at[ids.slots].add(weights, mode="drop")

    @property
    def _order(self) -> SampleOrder:
        return SampleOrder(self.features, self.exchange.stack.cores)

    def _look_up_on_tpu(self, table, ids, gains):
        from jax_tpu_embedding.sparsecore.lib.core.primitives import sparse_dense_matmul_csr

        quantization = self.exchange.stack.quantization
        if quantization is not None:
            quantization = (quantization.lower, quantization.upper, quantization.num_buckets)
        out = sparse_dense_matmul_csr.tpu_sparse_dense_matmul_csr_primitive.bind(
            ids.row_pointers,
            ids.embedding_ids,
            ids.sample_ids,
            gains,
            jnp.int32(1),
            table,
            device_batch_size=self.exchange.num_segments,
            max_ids_per_partition=ids.max_ids,
            max_unique_ids_per_partition=ids.max_unique_ids,
            sharding_strategy=1,
            quantization_config=quantization,
            enable_minibatching=False,
        )
        return self._order.to_segments(out)

    def _update_on_tpu(self, table, slots, ids, gains, gradients, step):
        from jax_tpu_embedding.sparsecore.lib.core.primitives import sparse_dense_matmul_optimizer_grad

        stack, names = self.exchange.stack, tuple(slots)
        row = jax.ShapeDtypeStruct((1, stack.dim), jnp.float32)
        rule = jax.make_jaxpr(functools.partial(_update_row, stack.optimizer, names))
        learning_rate = stack.optimizer.learning_rate_at(step)
        primitive = sparse_dense_matmul_optimizer_grad.tpu_sparse_dense_matmul_optimizer_grad_primitive
        updated = primitive.bind(
            ids.row_pointers,
            ids.embedding_ids,
            ids.sample_ids,
            gains,
            jnp.int32(1),
            self._order.to_samples(gradients),
            learning_rate,
            step.astype(jnp.float32),
            table,
            *slots.values(),
            num_hyperparameters=2,
            jaxpr=rule(*[row] * (4 + len(names))),
            max_ids_per_partition=ids.max_ids,
            max_unique_ids_per_partition=ids.max_unique_ids,
            computation_name=f"{stack.optimizer.name}-{stack.name}-{next(_CALLS)}",
            sharding_strategy=1,
        )
        return updated[0], dict(zip(names, updated[1:], strict=True))

    def _look_up_on_xla(self, table, ids, gains):
        positions, segments, gains, _ = self._entries(ids, gains)
        return xla.look_up(self.exchange, table, positions, segments, gains)[0]

    def _update_on_xla(self, table, slots, ids, gains, gradients, step):
        positions, segments, gains, _ = self._entries(ids, gains)
        return xla.update(self.exchange, table, slots, positions, segments, gains, gradients, step)

    def _entries(self, ids: SparseCoreIds, gains: jax.Array):
        """Positions, segments (ascending) and gains of the `xla` engine, [M], and which place each is of."""
        stack, cores = self.exchange.stack, self.exchange.stack.cores
        blocks, places = stack.num_blocks, ids.embedding_ids.shape[0] // cores
        ends = ids.row_pointers.reshape(cores, -1)[:, :blocks]
        starts = jnp.pad((ends[:, :-1] + 7) // 8 * 8, ((0, 0), (1, 0)))
        place = jnp.arange(places, dtype=jnp.int32)
        find = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right").astype(jnp.int32))
        partition = find(ends)
        start = jnp.take_along_axis(starts, jnp.minimum(partition, blocks - 1), axis=1)
        live = ((partition < blocks) & (place >= start)).reshape(-1)
        rows = ids.embedding_ids + partition.reshape(-1) * (stack.num_positions // blocks)
        segments = self._order.segments_of(ids.sample_ids.reshape(cores, -1)).reshape(-1)
        segments = jnp.where(live, segments, self.exchange.num_segments)
        rows, gains = jnp.where(live, rows, stack.num_positions), jnp.where(live, gains, 0)
        order = jnp.arange(rows.shape[0], dtype=jnp.int32)
        segments, rows, gains, order = lax.sort((segments, rows, gains, order), num_keys=1)
        return rows, segments, gains, order


def _update_row(optimizer, names, gradient, row, *rest):
    """The optimizer's rule on [1, W]; learning rate and step come as rows, too."""
    slots, (learning_rate, step) = dict(zip(names, rest, strict=False)), rest[len(names) :]
    row, slots = optimizer.update_rows(gradient, row, slots, learning_rate, step)
    return row, *(slots[name] for name in names)
