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
from .segments import join_features, split_features
from .sparsecore import SparseCoreEngine, SparseCoreIds
from .traffic import cheaper_exchange, exchanged_bytes, pair_window, sparsecore_bytes


class StepProgram:
    """The device side of a ShardedEmbedding.

    Args:
      stacks: by name.
      mesh: with automatic axes.
      axes: those over which batch and tables are sharded.
      exchange: "all_gather", "all_to_all" or "auto".
      row_kernels: "xla" or "pallas", by stack.
    """

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        mesh: Mesh,
        axes: tuple[str, ...],
        exchange: str,
        row_kernels: Mapping[str, str],
    ):
        self.stacks: dict[str, Stack] = dict(stacks)
        self.mesh: Mesh = mesh
        self.axes: tuple[str, ...] = axes
        self.exchange: str = exchange
        self.row_kernels: dict[str, str] = dict(row_kernels)
        self.look_up: jax.stages.Wrapped = jax.jit(self._look_up)
        self.update: jax.stages.Wrapped = jax.jit(self._update)

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
            tables = {
                name: stack.array_of(initial_rows(stack, key, shard)) for name, stack in self.stacks.items()
            }
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
        sizes = tuple(f.num_segments for f in layout.of_stack(stack))
        return xla.StackExchange(
            config, exchange, self.axes, num_segments, window, self.row_kernels[stack], sizes
        )

    def predicted_bytes(self, batch: ShardedBatch) -> int:
        """Bytes that one shard exchanges for a lookup and an update of a batch without weights."""
        total = 0
        for name, positions in batch.positions.items():
            ex = self.exchange_of(batch.layout, name, positions.shape[1])
            total += exchanged_bytes(ex.stack, ex.exchange, ex.num_segments, positions.shape[1])
        for name, ids in batch.sparsecore.items():
            total += sparsecore_bytes(self.stacks[name], ids.max_unique_ids)
        return total

    def _look_up(self, tables: dict[str, jax.Array], batch: ShardedBatch, weights: Any):
        """Outputs by feature, and the rounds of all_to_all by stack, as `xla.look_up` counts them."""
        outputs, rounds = self._activations(batch.layout, tables, weights, batch.entries)
        return [_to_output(f, out) for f, out in zip(batch.layout.features, outputs, strict=True)], rounds

    def _activations(
        self, layout: BatchLayout, tables, weights, entries
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """[n S_f, D] by feature, differentiable with respect to tables and weights, and rounds."""
        specs = self.specs()[0]
        engines = {name: self._engine(layout, name, entries[name]) for name in entries}
        tables = {name: tables[name] for name in entries}
        specs = {name: specs[name] for name in entries}
        on_shards = PartitionSpec(self.axes)

        def forward(tables, weights, entries):
            sums, rounds = {}, {}
            for name, engine in engines.items():
                table = self.stacks[name].rows_of(tables[name])
                sums[name], count = engine.look_up(table, *_local(name, entries, weights))
                if isinstance(engine, xla.XlaEngine) and xla.is_routed(engine.exchange):
                    rounds[name] = count
            return split_features(layout, sums), rounds

        def backward_tables(weights, entries, gradients):
            found = {}
            for name, engine in engines.items():
                stack = self.stacks[name]
                gradient = join_features(layout, gradients, name, stack.dim)
                columns = stack.dim // stack.num_shards if stack.kind == "column" else stack.dim
                shape = (stack.num_rows, columns)
                rows = engine.table_gradient(shape, *_local(name, entries, weights), gradient)
                found[name] = stack.array_of(rows.astype(stack.dtype))
            return found

        def backward_weights(tables, weights, entries, gradients):
            found = {}
            for name, engine in engines.items():
                stack = self.stacks[name]
                gradient = join_features(layout, gradients, name, stack.dim)
                table = stack.rows_of(tables[name])
                found[name] = engine.weight_gradient(table, *_local(name, entries, weights), gradient)[None]
            return found

        @jax.custom_vjp
        def call(tables, weights, entries):
            out_specs = (on_shards, PartitionSpec())
            return self._shard_map(forward, (specs, on_shards, on_shards), out_specs)(tables, weights, entries)

        def call_forward(*primals):
            wanted = [
                any(leaf.perturbed for leaf in jax.tree.leaves(p, is_leaf=_is_primal)) for p in primals[:2]
            ]
            values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
            # Empty pytrees carry what is static: () for yes, None for no.
            return call(*values), (values, [() if yes else None for yes in wanted])

        def call_backward(residuals, gradients):
            (tables, weights, entries), wanted = residuals
            gradients = [_instantiate(g) for g in gradients[0]]
            found: list[Any] = [None] * 3
            if wanted[0] is not None:
                backward = self._shard_map(backward_tables, (on_shards,) * 3, specs)
                found[0] = backward(weights, entries, gradients)
            if wanted[1] is not None:
                backward = self._shard_map(backward_weights, (specs, *(on_shards,) * 3), on_shards)
                found[1] = backward(tables, weights, entries, gradients)
            return tuple(found)

        call.defvjp(call_forward, call_backward, symbolic_zeros=True)
        return call(tables, weights, entries)

    def _update(
        self,
        tables,
        slots,
        batch: ShardedBatch,
        weights: Any,
        gradients: list[Any],
        step: jax.Array,
        called: dict[str, Any],
    ):
        layout = batch.layout
        gradients = [
            _from_output(f, gradient, self.stacks[f.stack].num_shards)
            for f, gradient in zip(layout.features, gradients, strict=True)
        ]
        on_shards = PartitionSpec(self.axes)
        specs = jax.tree.map(lambda spec: spec, self.specs())
        engines = {name: self._engine(layout, name, entries) for name, entries in batch.entries.items()}

        def body(tables, slots, entries, weights, gradients, step, called):
            tables, slots = dict(tables), dict(slots)
            for name, engine in engines.items():
                stack = self.stacks[name]
                if name in called:
                    engine = _with_called(engine, called[name])
                gradient = join_features(layout, gradients, name, stack.dim)
                table, kept = jax.tree.map(stack.rows_of, (tables[name], slots[name]))
                mine, values = _local(name, entries, weights)
                state = engine.update(table, kept, mine, values, gradient, step)
                tables[name], slots[name] = jax.tree.map(stack.array_of, state)
            for name, stack in self.stacks.items():
                if name in engines or stack.optimizer.is_lazy:
                    continue
                # All rows take a step, looked up or not. SparseCores hold none of such a table.
                optimizer = stack.optimizer.with_called(called[name]) if name in called else stack.optimizer
                zeros, rate = jnp.zeros(tables[name].shape, jnp.float32), optimizer.learning_rate_at(step)
                tables[name], slots[name] = optimizer.update_rows(zeros, tables[name], slots[name], rate, step)
            return tables, slots

        in_specs = (*specs, *(on_shards,) * 3, PartitionSpec(), PartitionSpec())
        program = self._shard_map(body, in_specs, specs)
        return program(tables, slots, batch.entries, weights, gradients, step, called)

    def _engine(self, layout: BatchLayout, name: str, entries: Any) -> xla.XlaEngine | SparseCoreEngine:
        """Of a stack, for entries [n, N]."""
        features = layout.of_stack(name)
        if isinstance(entries, SparseCoreIds):
            exchange = self.exchange_of(layout, name, entries.embedding_ids.shape[-1])
            return SparseCoreEngine(exchange, features)
        return xla.XlaEngine(self.exchange_of(layout, name, entries[0].shape[-1]), features)

    def _shard_map(self, body, in_specs, out_specs):
        # Replication is not tracked: scalars are the same on all shards by construction.
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local(name: str, entries: Any, weights: Any) -> tuple[Any, Any]:
    """This shard's entries of one stack, and their weights."""
    mine = jax.tree.map(lambda x: x[0], entries[name])
    return mine, None if weights is None else weights[name][0]


def _with_called(engine: Any, values: Any) -> Any:
    stack = engine.exchange.stack
    stack = dataclasses.replace(stack, optimizer=stack.optimizer.with_called(values))
    return dataclasses.replace(engine, exchange=dataclasses.replace(engine.exchange, stack=stack))


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


def _from_output(feature: FeatureLayout, gradient: jax.Array, num_shards: int) -> jax.Array:
    gradient = gradient.reshape(-1, feature.output_shape[-1])
    missing = num_shards * feature.num_segments - gradient.shape[0]
    return jnp.pad(gradient, ((0, missing), (0, 0))) if missing else gradient


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _instantiate(gradient: Any) -> jax.Array:
    if isinstance(gradient, SymbolicZero):
        return jnp.zeros(gradient.shape, gradient.dtype)  # pyright: ignore[reportArgumentType]
    return gradient
