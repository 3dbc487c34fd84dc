"""Lookups and updates of all stacks as programs over the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import xla
from .batch import BatchLayout, FeatureLayout, ShardedBatch
from .placement import Stack
from .segments import join_features, scale, split_features
from .traffic import cheaper_exchange, exchanged_bytes, pair_window


class StepProgram:
    """The device side of a ShardedEmbedding.

    Args:
      stacks: by name.
      mesh: with automatic axes.
      axes: those over which batch and tables are sharded.
      exchange: "all_gather", "all_to_all" or "auto".
    """

    def __init__(self, stacks: Mapping[str, Stack], mesh: Mesh, axes: tuple[str, ...], exchange: str):
        self.stacks, self.mesh, self.axes, self.exchange = dict(stacks), mesh, axes, exchange
        self.look_up = jax.jit(self._look_up)
        self.update = jax.jit(self._update)

    def specs(self) -> tuple[dict[str, PartitionSpec], dict[str, dict[str, PartitionSpec]]]:
        """How tables and slots are sharded, by stack."""
        split = {
            "row": PartitionSpec(self.axes),
            "column": PartitionSpec(None, self.axes),
            "replicated": PartitionSpec(),
        }
        tables = {name: split[stack.kind] for name, stack in self.stacks.items()}
        slots = {
            name: dict.fromkeys(stack.optimizer.slot_names, split[stack.kind])
            for name, stack in self.stacks.items()
        }
        return tables, slots

    def shardings(self) -> tuple[dict[str, NamedSharding], dict[str, dict[str, NamedSharding]]]:
        """The same as shardings."""
        return jax.tree.map(partial(NamedSharding, self.mesh), self.specs())

    def abstract(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Tables and slots without the values."""
        tables, slots = self.shardings()
        return (
            {
                name: jax.ShapeDtypeStruct(stack.shape((stack.dim,)), stack.dtype, sharding=tables[name])
                for name, stack in self.stacks.items()
            },
            {
                name: {
                    slot: jax.ShapeDtypeStruct(
                        stack.shape(stack.slot_trailing(slot)), jnp.float32, sharding=sharding
                    )
                    for slot, sharding in slots[name].items()
                }
                for name, stack in self.stacks.items()
            },
        )

    def init(self, key: jax.Array, initial_rows: Callable[[Stack, jax.Array, Any], jax.Array]) -> Any:
        """Fresh tables and slots, each shard its own piece."""

        def body(key):
            shard = lax.axis_index(self.axes)
            tables = {name: initial_rows(stack, key, shard) for name, stack in self.stacks.items()}
            return tables, {
                name: _initial_slots(self.stacks[name], table.shape) for name, table in tables.items()
            }

        return jax.jit(self._shard_map(body, PartitionSpec(), self.specs()))(key)

    def exchange_of(self, layout: BatchLayout, stack: str, capacity: int) -> xla.StackExchange:
        """How a stack is looked up in a batch whose shards have room for `capacity` entries each."""
        config, num_segments = self.stacks[stack], layout.num_segments(stack)
        exchange = self.exchange
        if exchange == "auto":
            exchange = cheaper_exchange(config, num_segments, capacity)
        window = pair_window(capacity, config.num_shards) if exchange == "all_to_all" else capacity
        return xla.StackExchange(config, exchange, self.axes, num_segments, window)

    def predicted_bytes(self, batch: ShardedBatch) -> int:
        """Bytes that one shard exchanges for a lookup and an update of a batch without weights."""
        total = 0
        for name, positions in batch.positions.items():
            ex = self.exchange_of(batch.layout, name, positions.shape[1])
            total += exchanged_bytes(ex.stack, ex.exchange, ex.num_segments, positions.shape[1])
        return total

    def _look_up(self, tables: dict[str, jax.Array], batch: ShardedBatch, weights: Any) -> list[jax.Array]:
        outputs = self._activations(batch.layout, tables, weights, batch.positions, batch.segments)
        return [_to_output(f, out) for f, out in zip(batch.layout.features, outputs, strict=True)]

    def _activations(self, layout: BatchLayout, tables, weights, positions, segments) -> list[jax.Array]:
        """[n S_f, D] by feature; differentiable with respect to tables and weights."""
        specs = self.specs()[0]
        exchanges = {name: self.exchange_of(layout, name, positions[name].shape[1]) for name in positions}
        tables = {name: tables[name] for name in positions}
        specs = {name: specs[name] for name in positions}
        on_shards = PartitionSpec(self.axes)

        def forward(tables, weights, positions, segments):
            sums = {}
            for name, ex in exchanges.items():
                sums[name] = _sums(ex, layout, tables[name], *_local(name, positions, segments, weights))
            return split_features(layout, sums)

        def backward_tables(weights, positions, segments, gradients):
            found = {}
            for name, ex in exchanges.items():
                args = _local(name, positions, segments, weights)
                _, scales = _scaled(layout, name, *args[1:])
                gradient = _times(join_features(layout, gradients, name), scales)
                shape = (ex.stack.num_rows, ex.stack.dim)
                if ex.stack.kind == "column":
                    shape = (shape[0], shape[1] // ex.stack.num_shards)
                found[name] = xla.sum_gradients(ex, shape, *args, gradient)[0].astype(ex.stack.dtype)
            return found

        def backward_weights(tables, weights, positions, segments, gradients):
            found = {}
            for name, ex in exchanges.items():
                position, segment, weight = _local(name, positions, segments, weights)
                gradient = join_features(layout, gradients, name)
                vjp, scales = _scaled(layout, name, segment, weight)
                direct = _one_to_one(ex, position.shape[0])
                found[name] = xla.weight_gradients(
                    direct, tables[name], position, segment, _times(gradient, scales)
                )
                if scales is not None:
                    sums = xla.look_up(ex, tables[name], position, segment, weight)
                    found[name] += vjp(jnp.sum(gradient * sums, axis=1))[0]
                found[name] = found[name][None]
            return found

        @jax.custom_vjp
        def call(tables, weights, positions, segments):
            in_specs = (specs, on_shards, on_shards, on_shards)
            return self._shard_map(forward, in_specs, on_shards)(tables, weights, positions, segments)

        def call_forward(*primals):
            wanted = [
                any(leaf.perturbed for leaf in jax.tree.leaves(p, is_leaf=_is_primal)) for p in primals[:2]
            ]
            values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
            # Empty pytrees carry what is static: () for yes, None for no.
            return call(*values), (values, [() if yes else None for yes in wanted])

        def call_backward(residuals, gradients):
            (tables, weights, positions, segments), wanted = residuals
            gradients = [_instantiate(g) for g in gradients]
            found: list[Any] = [None] * 4
            if wanted[0] is not None:
                in_specs = (on_shards,) * 4
                found[0] = self._shard_map(backward_tables, in_specs, specs)(
                    weights, positions, segments, gradients
                )
            if wanted[1] is not None:
                in_specs = (specs, *(on_shards,) * 4)
                found[1] = self._shard_map(backward_weights, in_specs, on_shards)(
                    tables, weights, positions, segments, gradients
                )
            return tuple(found)

        call.defvjp(call_forward, call_backward, symbolic_zeros=True)
        return call(tables, weights, positions, segments)

    def _update(self, tables, slots, batch: ShardedBatch, weights: Any, gradients: list[Any], step: jax.Array):
        layout = batch.layout
        gradients = [
            _from_output(f, gradient, self.stacks[f.stack].num_shards)
            for f, gradient in zip(layout.features, gradients, strict=True)
        ]
        on_shards = PartitionSpec(self.axes)
        specs = jax.tree.map(lambda spec: spec, self.specs())

        def body(tables, slots, positions, segments, weights, gradients, step):
            tables, slots = dict(tables), dict(slots)
            for name in positions:
                ex = self.exchange_of(layout, name, positions[name].shape[1])
                args = _local(name, positions, segments, weights)
                _, scales = _scaled(layout, name, *args[1:])
                gradient = _times(join_features(layout, gradients, name), scales)
                tables[name], slots[name] = xla.update(ex, tables[name], slots[name], *args, gradient, step)
            return tables, slots

        in_specs = (*specs, *(on_shards,) * 4, PartitionSpec())
        return self._shard_map(body, in_specs, specs)(
            tables, slots, batch.positions, batch.segments, weights, gradients, step
        )

    def _shard_map(self, body, in_specs, out_specs):
        # Replication is not tracked: scalars are the same on all shards by construction.
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _sums(ex: xla.StackExchange, layout: BatchLayout, table, positions, segments, weights) -> jax.Array:
    sums = xla.look_up(ex, table, positions, segments, weights)
    return _times(sums, scale(layout.of_stack(ex.stack.name), segments, weights))


def _scaled(layout: BatchLayout, stack: str, segments, weights):
    """The scale of each segment (or None), and its derivative with respect to the weights."""
    features = layout.of_stack(stack)
    if weights is None:
        return None, scale(features, segments, None)
    scales = scale(features, segments, weights)
    if scales is None:
        return None, None
    return jax.vjp(lambda weights: scale(features, segments, weights), weights)[1], scales


def _one_to_one(ex: xla.StackExchange, capacity: int) -> xla.StackExchange:
    if ex.stack.kind != "row":
        return ex
    window = pair_window(capacity, ex.stack.num_shards)
    return dataclasses.replace(ex, exchange="all_to_all", window=window)


def _local(name: str, positions, segments, weights):
    """This shard's entries of one stack."""
    return positions[name][0], segments[name][0], None if weights is None else weights[name][0]


def _times(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    return values if scales is None else values * scales[:, None]


def _initial_slots(stack: Stack, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    optimizer = stack.optimizer
    return {
        name: jnp.full(optimizer.slot_shape(name, shape), value, jnp.float32)
        for name, value in optimizer.slot_initial_values.items()
    }


def _to_output(feature: FeatureLayout, out: jax.Array) -> jax.Array:
    real = feature.num_rows * feature.inner
    out = out if out.shape[0] == real else out[:real]
    return out.reshape(feature.output_shape)


def _from_output(feature: FeatureLayout, gradient: Any, num_shards: int) -> jax.Array:
    gradient = jnp.asarray(gradient)
    if gradient.shape != feature.output_shape:
        raise ValueError(
            f"gradient of feature {feature.path!r} must have the shape of its activation, "
            f"{list(feature.output_shape)}, got {list(gradient.shape)}."
        )
    gradient = gradient.reshape(-1, feature.output_shape[-1])
    missing = num_shards * feature.num_segments - gradient.shape[0]
    return jnp.pad(gradient, ((0, missing), (0, 0))) if missing else gradient


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _instantiate(gradient: Any) -> jax.Array:
    return jnp.zeros(gradient.shape, gradient.dtype) if isinstance(gradient, SymbolicZero) else gradient
