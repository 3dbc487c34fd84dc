"""ShardedEmbedding: tables spread over a mesh, looked up and updated with explicit collectives."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.config import TableConfig
from jaxembed.features import feature_tables
from jaxembed.optimizers import Optimizer
from jaxembed.preprocessing import preprocess
from jaxembed.validation import check_ids

from .engines import custom, packing
from .engines.auto_plan import plan_for_batch
from .engines.batch import PackedBatch, ShardedBatch, ShardedWeights
from .engines.canonical import CanonicalTables
from .engines.initial import draws_by_row, initial_rows, table_key
from .engines.placement import stack_tables
from .engines.planner import ShardingPlan
from .engines.sparsecore_packing import SparseCorePacking
from .engines.sparsecore_stacks import refused_tables, sparse_cores, stack_on_sparsecores
from .engines.step import StepProgram

EXCHANGES = ("auto", "all_gather", "all_to_all")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """Tables and slots in the layout of one mesh; `ShardedEmbedding.to_canonical` gives them by table.

    Attributes:
      tables: stack name to array.
      slots: stack name to slot name to float32 array.
      step: int32 scalar, number of updates taken.
      combiner_weights: table name to the float32 [num_weights] of its CustomCombiner, whole on every device.
    """

    tables: dict[str, jax.Array]
    slots: dict[str, dict[str, jax.Array]]
    step: jax.Array
    combiner_weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class ShardedEmbedding:
    """Embedding tables sharded over the devices of a mesh, with their optimizers.

    Functional: the state is a pytree that the caller keeps. All methods but `shard_batch` work inside of
    `jax.jit`; donate the state to a jitted step to update the tables in place. The gradient that
    `apply_gradients` takes is the one of a loss with respect to the activations:

        activations = embedding.lookup(state, batch)
        gradients = jax.grad(loss)(activations)
        state = embedding.apply_gradients(state, batch, gradients)

    Only rows that a batch looks up are touched: the cost of a step does not grow with the vocabulary. Ids
    outside [0, V) are refused where `lookup` lays a batch out itself; elsewhere they give zeros, are counted
    where asked, and never update a row.

    Args:
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      mesh: of the devices. Its axes are taken as automatic ones; `embedding.mesh` has them.
      axis: axis or axes of the mesh over which batch and tables are sharded; None takes all.
      plan: table name to "mod", "div", "table", "column" or "replicated" (`engines.placement`), or what
        `plan_tables` chose; None and tables that it leaves out take "mod". "auto" plans for `example_batch` and
        the devices' memory, logs the plan and keeps it as `plan`.
      exchange: how rows travel: "all_gather" (`engines.gathering`), "all_to_all" (`engines.routing`), or
        "auto", the one that moves fewer bytes.
      engine: "xla"; "sparsecore" (v5p, v6e and later, with jax-tpu-embedding installed), which leaves tables
        that SparseCores cannot hold to "xla", and says so; or "auto", the latter where the mesh has them.
      capacity: entries that a shard has room for in each stack, of all its features together. None takes
        what the batches need, in steps of a thirty-second, and never less than before.
      example_batch: of `plan="auto"`: a batch of this host like those to come.
      overrides: of `plan="auto"`: table name to sharding.

    Raises:
      ValueError: if an argument is not of the form above.

    References:
      `tf.tpu.experimental.embedding.TPUEmbeddingV2`.
    """

    def __init__(
        self,
        feature_config: Any,
        optimizer: Optimizer | None,
        mesh: Mesh,
        *,
        axis: str | tuple[str, ...] | None = None,
        plan: Mapping[str, str] | ShardingPlan | str | None = None,
        exchange: str = "auto",
        engine: str = "auto",
        capacity: int | None = None,
        example_batch: Any = None,
        overrides: Mapping[str, str] | None = None,
    ):
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}.")
        self.feature_config = feature_config
        self.mesh = Mesh(mesh.devices, mesh.axis_names)
        self.axes = _mesh_axes(mesh, axis)
        self.num_shards = math.prod(self.mesh.shape[axis] for axis in self.axes)
        cores = sparse_cores(engine, self.mesh.devices.flat[0])
        self.tables = feature_tables(feature_config)
        if (example_batch is not None or overrides is not None) and plan != "auto":
            raise ValueError(f"example_batch and overrides are of plan='auto', got plan={plan!r}.")
        if isinstance(plan, str):
            if plan != "auto" or example_batch is None:
                raise ValueError(
                    f"plan must be 'auto' with an example_batch, a plan, or sharding by table, got {plan!r} and "
                    f"example_batch {type(example_batch).__name__}."
                )
            batch = preprocess(example_batch, feature_config)
            plan = plan_for_batch(feature_config, optimizer, self.mesh, self.num_shards, batch, overrides)
        self.plan = plan if isinstance(plan, ShardingPlan) else None
        if isinstance(plan, ShardingPlan):
            if plan.num_shards != self.num_shards:
                raise ValueError(
                    f"the plan is for {plan.num_shards} devices, got a mesh of {self.num_shards}; make it with "
                    f"plan_tables(..., num_shards={self.num_shards})."
                )
            plan = plan.shardings
        plan = dict(plan or {})
        unknown = sorted(set(plan) - set(self.tables))
        if unknown:
            raise ValueError(
                f"plan names no table of the configuration: {unknown}; it has {list(self.tables)}."
            )
        shardings = {name: plan.get(name, "mod") for name in self.tables}
        self.stacks = {
            stack.name: stack for stack in _stack(self.tables, optimizer, shardings, self.num_shards, cores)
        }
        self._sparsecore = SparseCorePacking()
        self._program = StepProgram(self.stacks, self.mesh, self.axes, exchange)
        self._canonical = CanonicalTables(
            self.stacks, list(self.tables), self.mesh, self.axes, self._program.shardings()
        )
        self._capacity = dict.fromkeys(self.stacks, capacity or 0)
        self._is_capacity_fixed = capacity is not None
        self._largest = jax.jit(partial(jnp.max, axis=0), out_shardings=self.replicated)

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The first dimension over all shards, as that of activations."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    def init(self, key: jax.Array) -> EmbeddingState:
        """A fresh state; the same tables from one key on every mesh."""
        tables, slots = self._program.init(key, initial_rows)
        special = [table for table in self.tables.values() if not draws_by_row(table)]
        if special or any(s.optimizer.slot_variable_creation_fn is not None for s in self.stacks.values()):
            tables, slots = self._init_whole(key, EmbeddingState(tables, slots, jnp.int32(0)), special)
        weights = custom.initial_weights(self.tables, key)
        return EmbeddingState(tables, slots, *jax.device_put((jnp.int32(0), weights), self.replicated))

    def abstract_state(self) -> EmbeddingState:
        """Shapes, types and shardings of a state, for compiling ahead of time."""
        tables, slots = self._program.abstract()
        whole = partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        weights = {name: whole(shape, jnp.float32) for name, shape in custom.weight_shapes(self.tables).items()}
        return EmbeddingState(tables, slots, whole((), jnp.int32), weights)

    def lookup(
        self,
        state: EmbeddingState,
        batch: Any,
        weights: Any = None,
        *,
        count_bad_ids: bool = False,
        count_rounds: bool = False,
    ) -> Any:
        """Looks every input up, as `serving_embedding_lookup` does.

        Differentiable with respect to the weights and `state.combiner_weights` (and the tables, at the cost of
        whole ones).

        Args:
          state: of this embedding.
          batch: a ShardedBatch, or inputs as of `serving_embedding_lookup`, which are then laid out here:
            ragged and sparse ones only outside of `jax.jit`.
          weights: as `shard_batch` returned them, or as of `serving_embedding_lookup`.
          count_bad_ids: also return how many ids of each feature were outside [0, V).
          count_rounds: also return how many rounds of all_to_all the lookup took, int32 by stack whose rows
            travel so: more than 1 where the batch overflows the window of a round. Nothing is dropped then;
            lookup and update take that many times as long.

        Returns:
          A structure like the batch of activations, sharded over their first dimension; with counts a tuple.

        Raises:
          ValueError: if batch or weights do not fit the configuration, or inputs that are laid out here hold an
            id outside [0, V) and are not counted. Of a ShardedBatch, such ids give zeros.
        """
        batch, values = self._sharded(batch, weights, refuse_bad_ids=not count_bad_ids)
        outputs, rounds = self._program.look_up(state.tables, batch, values)
        outputs = custom.combine(batch.layout, outputs, batch.valencies, state.combiner_weights)
        activations = batch.layout.skeleton.pack(outputs)
        counts = []
        if count_bad_ids:
            bad_ids = jnp.sum(batch.bad_ids, axis=0, dtype=jnp.int32)
            counts.append(batch.layout.skeleton.pack(list(bad_ids)))
        if count_rounds:
            counts.append(rounds)
        return (activations, *counts) if counts else activations

    def apply_gradients(
        self,
        state: EmbeddingState,
        batch: Any,
        activation_gradients: Any,
        weights: Any = None,
        *,
        called_values: dict[str, Any] | None = None,
    ) -> EmbeddingState:
        """One step of every table's optimizer on the rows that the batch looked up.

        Weights of custom combiners take a step of SGD with their `combiner_weights_learning_rate`; the rows that
        these combine are looked up once more.

        Args:
          state: of this embedding.
          batch: what was looked up.
          activation_gradients: a structure like the activations.
          weights: what it was looked up with.
          called_values: what `called_values` returned outside of the `jax.jit` that this is called in; None calls
            it now.

        Returns:
          The next state.

        Raises:
          ValueError: if an argument does not fit the batch.
        """
        batch, values = self._sharded(batch, weights)
        gradients = batch.layout.skeleton.flatten(activation_gradients, "activation_gradients")
        combiner_weights = state.combiner_weights
        if batch.valencies:
            outputs, _ = self._program.look_up(state.tables, batch, values)
            gradients, found = custom.pull_back(
                batch.layout, outputs, batch.valencies, combiner_weights, gradients
            )
            combiner_weights = custom.updated_weights(self.tables, combiner_weights, found)
        if called_values is None:
            called_values = self._called_now(state.step)
        tables, slots = self._program.update(
            state.tables, state.slots, batch, values, gradients, state.step, called_values
        )
        return EmbeddingState(tables, slots, state.step + 1, combiner_weights)

    def called_values(self) -> dict[str, Any]:
        """What learning rates and hyperparameters that are callables without arguments return now.

        A jitted step takes it as an argument and passes it to `apply_gradients`: the callables would otherwise be
        called only when the step is compiled. With several hosts they must return the same on all.

        Returns:
          float32 scalars by stack; empty where there are no such callables.
        """
        called = {name: stack.optimizer.callables for name, stack in self.stacks.items()}
        return {name: tuple(_scalar(f()) for f in functions) for name, functions in called.items() if functions}

    def shard_batch(self, batch: Any, weights: Any = None) -> tuple[ShardedBatch, ShardedWeights | None]:
        """Lays a batch out over the shards, on the host; call it outside of `jax.jit`.

        With several hosts, each passes its own rows, in turn, and all get the one global batch. They agree
        on its shapes, so all of them must call it on the same batches in the same order, on one thread;
        `pack_batch`, `agree` and `place_batch` are its parts.

        Args:
          batch: inputs as of `serving_embedding_lookup`; raw ids where a feature has preprocessing.
          weights: likewise.

        Returns:
          What `lookup` and `apply_gradients` take; the weights are None where no feature has any.

        Raises:
          ValueError: if they do not fit the configuration, or the entries of a shard the fixed capacity.
        """
        return self._shard(self._plan(batch, weights))

    def pack_batch(self, batch: Any, weights: Any = None) -> PackedBatch:
        """The host's half of `shard_batch`: for a thread of its own, while a step runs.

        Args:
          batch: as of `shard_batch`.
          weights: likewise.

        Raises:
          ValueError: as `shard_batch`.
        """
        return self._pack(self._plan(batch, weights))

    @property
    def packs_alone(self) -> bool:
        """Whether `pack_batch` asks no other host, and so may run on a thread; with SparseCores it does ask."""
        return jax.process_count() == 1 or not any(stack.cores for stack in self.stacks.values())

    def agree(self, packed: PackedBatch) -> jax.Array | None:
        """Starts to agree with the other hosts on how many entries a shard has room for.

        A computation over all hosts: each must call it on its part of the same batch, in the same order.
        It does not wait; begun a step or two before its `place_batch`, it costs no time.

        Returns:
          int32 by stack, or None where there is nothing to agree on.
        """
        if jax.process_count() == 1 or not packed.needs_agreement:
            return None
        local = np.tile(np.asarray(list(packed.room.values()), np.int32), (self._num_local_shards(), 1))
        return self._largest(jax.make_array_from_process_local_data(self.batch_sharding, local))

    def place_batch(
        self, packed: PackedBatch, agreed: jax.Array | None = None
    ) -> tuple[ShardedBatch, ShardedWeights | None]:
        """The devices' half of `shard_batch`.

        Args:
          packed: what `pack_batch` returned.
          agreed: what `agree` returned for it.
        """
        if agreed is not None:
            room = dict(zip(packed.room, np.asarray(agreed).tolist(), strict=True))
            self.reserve(room)
            packed = packing.widen(packed, self.stacks, room)
        put = partial(jax.make_array_from_process_local_data, self.batch_sharding)
        placed = jax.tree.map(put, packed.batch)
        return placed, None if packed.weights is None else ShardedWeights(jax.tree.map(put, packed.weights))

    @property
    def capacities(self) -> dict[str, int]:
        """Entries that a shard has room for, by stack, as the batches so far needed them."""
        return dict(self._capacity)

    def reserve(self, capacities: Mapping[str, int]) -> None:
        """Makes room for at least these, so that a resumed run compiles the programs that it was in."""
        for stack in self._capacity:
            if not self._is_capacity_fixed:
                self._capacity[stack] = max(self._capacity[stack], int(capacities.get(stack, 0)))

    def abstract_batch(self, batch: Any, weights: Any = None) -> tuple[ShardedBatch, ShardedWeights | None]:
        """Shapes, types and shardings of what `shard_batch` returns for a batch, for compiling ahead of time.

        The devices of the mesh need not be there: `jax.experimental.topologies` describes them.
        """
        packed = self._pack(self._plan(batch, weights))
        hosts = jax.process_count()

        def abstract(x):
            shape = (x.shape[0] * hosts, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.batch_sharding)

        weights = packed.weights
        weights = None if weights is None else ShardedWeights(jax.tree.map(abstract, weights))
        return jax.tree.map(abstract, packed.batch), weights

    def predicted_bytes(self, batch: ShardedBatch) -> int:
        """Bytes that a device exchanges for a lookup and an update of a batch, as `engines.traffic` says."""
        return self._program.predicted_bytes(batch)

    def unshard_weights(self, gradients: ShardedWeights, batch: Any, weights: Any) -> Any:
        """Gradients of sharded weights in the form of the weights that the caller gave, on the host.

        Args:
          gradients: with respect to the weights of `shard_batch(batch, weights)`.
          batch: what was passed to `shard_batch`.
          weights: likewise.

        Returns:
          A structure like `weights`.
        """
        plan = self._plan(batch, weights)
        values = jax.tree.map(np.asarray, gradients.values)
        flat = packing.unpack_weights(plan, self.stacks, values, self.num_shards)
        leaves = [
            item.weights if value is None else _with_values(item.weights, value)
            for item, value in zip(plan.items, flat, strict=True)
        ]
        return plan.layout.skeleton.pack(leaves)

    def embedding_tables(self, state: EmbeddingState) -> dict[TableConfig, jax.Array]:
        """The [V, D] tables by TableConfig, as `serving_embedding_lookup` takes them."""
        tables, _, _ = self.to_canonical(state)
        return {self.tables[name]: table for name, table in tables.items()}

    def slots(self, state: EmbeddingState) -> dict[str, dict[str, jax.Array]]:
        """The slots by table name and TensorFlow's name of the slot, [V, D] each."""
        return self.to_canonical(state)[1]

    def to_canonical(
        self, state: EmbeddingState
    ) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]], jax.Array]:
        """Tables [V, D] by name, slots by table and slot name, and the step: the same on every mesh."""
        return *self._canonical.from_stacks(state.tables, state.slots), state.step

    def from_canonical(
        self,
        tables: Mapping[str, Any],
        slots: Mapping[str, Mapping[str, Any]],
        step: Any,
        combiner_weights: Mapping[str, Any] | None = None,
    ) -> EmbeddingState:
        """The state that `to_canonical` of any mesh gave, and its `combiner_weights`.

        Raises:
          ValueError: if a table, slot or weight is missing or not of its shape.
        """
        new_tables, new_slots = self._canonical.to_stacks(tables, slots)
        weights = custom.checked_weights(self.tables, combiner_weights)
        small = jax.device_put((jnp.asarray(step, jnp.int32), weights), self.replicated)
        return EmbeddingState(new_tables, new_slots, *small)

    def abstract_canonical(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Shapes, types and shardings of canonical tables and slots, without the values."""
        return self._canonical.abstract()

    def _called_now(self, step: Any) -> dict[str, Any]:
        values = self.called_values()
        concrete = [v for v in jax.tree.leaves(values) if not isinstance(v, jax.core.Tracer)]
        if concrete and isinstance(step, jax.core.Tracer):
            raise ValueError(
                "a learning rate is a callable without arguments, which a jitted step would call only once: pass "
                "embedding.called_values() to the step as an argument, and from there to apply_gradients as "
                "called_values; or use a schedule of the step."
            )
        return values

    def _pack(self, plan: packing.Plan) -> PackedBatch:
        num_shards = self._num_local_shards()
        packed = packing.pack_on_host(plan, self.stacks, range(num_shards), self._room, self._sparsecore)
        valencies = custom.valencies_on_host(plan.layout, plan.lookups, num_shards)
        return dataclasses.replace(packed, batch=dataclasses.replace(packed.batch, valencies=valencies))

    def _num_local_shards(self) -> int:
        return self.num_shards // jax.process_count()

    def _plan(self, batch: Any, weights: Any) -> packing.Plan:
        batch = preprocess(batch, self.feature_config)
        return packing.plan_batch(batch, weights, self.feature_config, self.stacks, jax.process_count())

    def _shard(self, plan: packing.Plan) -> tuple[ShardedBatch, ShardedWeights | None]:
        if packing.is_traced(plan):
            return packing.pack_in_trace(plan, self.stacks, self.num_shards), None
        packed = self._pack(plan)
        return self.place_batch(packed, self.agree(packed))

    def _sharded(self, batch: Any, weights: Any, refuse_bad_ids: bool = False) -> tuple[ShardedBatch, Any]:
        if not isinstance(batch, ShardedBatch):
            plan = self._plan(batch, weights)
            if refuse_bad_ids:
                for item, lookup in zip(plan.items, plan.lookups, strict=True):
                    check_ids(item.path, item.feature.table, lookup)
            batch, weights = self._shard(plan)
        if weights is None:
            return batch, None
        if not isinstance(weights, ShardedWeights) or set(weights.values) != set(batch.entries):
            raise ValueError(
                f"weights of a ShardedBatch must be what shard_batch returned with it, got {type(weights).__name__}."
            )
        return batch, weights.values

    def _room(self, stack: str, num_entries: int) -> int:
        """How many entries a shard has room for in a stack; few different numbers, so few compilations."""
        if self._is_capacity_fixed:
            if num_entries > self._capacity[stack]:
                raise ValueError(
                    f"a shard has {num_entries} ids to look up in stack {stack!r}, more than the capacity of "
                    f"{self._capacity[stack]}; pass a larger capacity to ShardedEmbedding."
                )
        elif num_entries > self._capacity[stack]:
            self._capacity[stack] = _next_capacity(num_entries)
        return max(self._capacity[stack], 8)

    def _init_whole(self, key: jax.Array, state: EmbeddingState, special: list[TableConfig]) -> Any:
        """Replaces tables and slots whose initial values must be made whole."""
        tables, slots, _ = self.to_canonical(state)
        for table in special:
            draw = jax.jit(table.initializer, static_argnums=(1, 2), out_shardings=tables[table.name].sharding)
            tables[table.name] = draw(table_key(key, table), (table.vocabulary_size, table.dim), table.dtype)
        for stack in self.stacks.values():
            if stack.optimizer.slot_variable_creation_fn is not None:
                for p in stack.placements:
                    slots[p.table.name] = stack.optimizer.init_slots((p.table.vocabulary_size, p.table.dim))
        return self._canonical.to_stacks(tables, slots)


def _scalar(value: Any) -> Any:
    return (
        jnp.asarray(value, jnp.float32) if isinstance(value, jax.core.Tracer) else np.asarray(value, np.float32)
    )


def _stack(tables, optimizer: Optimizer | None, shardings: dict[str, str], num_shards: int, cores: int):
    """The stacks of both engines."""
    if not cores:
        return stack_tables(tables, optimizer, shardings, num_shards)
    refused = refused_tables(tables, optimizer, shardings, num_shards * cores)
    left = {name: table for name, table in tables.items() if name in refused}
    held = {name: table for name, table in tables.items() if name not in refused}
    return (
        *stack_on_sparsecores(held, optimizer, num_shards, cores),
        *stack_tables(left, optimizer, shardings, num_shards),
    )


def _mesh_axes(mesh: Mesh, axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return tuple(mesh.axis_names)
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or len(set(axes)) != len(axes) or not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"axis must name axes of the mesh, {mesh.axis_names}, got {axis!r}.")
    return axes


def _next_capacity(num_entries: int) -> int:
    """The next of numbers in steps of 8, later of a thirty-second to a sixty-fourth."""
    step = 1 << max(math.ceil(math.log2(max(num_entries, 1))) - 6, 3)
    return -(-num_entries // step) * step


def _with_values(weights: Any, values: np.ndarray) -> Any:
    values = values.astype(weights.dtype)
    return dataclasses.replace(weights, values=values)
