"""ShardedEmbedding: tables spread over a mesh, looked up and updated with explicit collectives."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxembed.config import TableConfig
from jaxembed.features import feature_tables
from jaxembed.optimizers import Optimizer
from jaxembed.shapes import ActivationTree, AnyCombinerWeights, AnyTable, Inputs, Scalar, Table, Weights

from .engines import custom
from .engines.auto_plan import chosen_plan, shardings_of
from .engines.batch import ShardedBatch, ShardedWeights
from .engines.called import called_now, called_values
from .engines.canonical import CanonicalTables
from .engines.gradients import checked_gradients
from .engines.initial import initial_rows, whole_slots, whole_tables
from .engines.planner import ShardingPlan
from .engines.row_kernels import choose_row_kernels
from .engines.sparsecore_stacks import log_refused, refused_tables, sparse_cores
from .engines.stacking import mesh_axes, stacks_of
from .engines.step import StepProgram
from .engines.traffic import check_exchange
from .sharded_inputs import ShardedInputs
from .stack_reading import arrays_on_host, read_stacks
from .state import EmbeddingState


class ShardedEmbedding(ShardedInputs):
    """Embedding tables sharded over the devices of a mesh, with their optimizers.

    Functional: the state is a pytree that the caller keeps. `lookup` and `apply_gradients` work inside of `jax.jit`, as
    do all methods that do not say otherwise; donate the state to a jitted step to update the tables in place. The
    gradient that `apply_gradients` takes is the one of a loss with respect to the activations:

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
        that SparseCores cannot hold to "xla", and says so; or "auto", the latter where the mesh has them. On
        devices that are no TPUs, "sparsecore" is emulated, with 4 SparseCores a device: the same layout and
        packing of batches, rows read and updated as "xla" does. For tests; it shows nothing of a TPU's speed.
      row_kernels: what reads and updates rows of float32 tables on the "xla" engine where D is a multiple of 128:
        "xla"; "pallas", kernels for TPUs that move single rows (`engines.pallas_rows`), other tables staying on
        "xla", as the log says; or "auto", these kernels on TPUs, after they were tried on one of each process: where
        they give other rows than XLA, or take longer, they are left. `row_kernels` of the embedding has what was
        chosen.
      capacity: entries that a shard has room for in each stack, of all its features together. None takes
        what the batches need, in steps of a thirty-second, and never less than before.
      example_batch: of `plan="auto"`: a batch of this host like those to come, without rows that fill it up: every id
        is counted, and preprocessing refuses what it refuses of real rows.
      overrides: of `plan="auto"`: table name to sharding.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import SGD
      >>> movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> embedding = ShardedEmbedding(features, SGD(1.0), mesh)
      >>> state = embedding.init(jax.random.key(0))
      >>> ids = {"watched": je.RaggedTensor.from_lists([[0, 1], [], [3], [3]] * 2)}
      >>> batch, _ = embedding.shard_batch(ids)
      >>> activations = embedding.lookup(state, batch)
      >>> activations["watched"].shape
      (8, 2)
      >>> gradients = jax.tree.map(jnp.ones_like, activations)
      >>> embedding.apply_gradients(state, batch, gradients).step.item()
      1

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
        row_kernels: str = "auto",
        capacity: int | None = None,
        example_batch: Any = None,
        overrides: Mapping[str, str] | None = None,
    ):
        check_exchange(exchange)
        axes = mesh_axes(mesh, axis)
        mesh = Mesh(mesh.devices, mesh.axis_names)
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        cores = sparse_cores(engine, mesh.devices.flat[0], num_shards)
        self.tables: dict[str, TableConfig] = feature_tables(feature_config)
        plan = chosen_plan(
            plan, feature_config, optimizer, mesh, num_shards, cores, exchange, example_batch, overrides
        )
        self.plan: ShardingPlan | None = plan if isinstance(plan, ShardingPlan) else None
        shardings = shardings_of(plan, self.tables, num_shards)
        stacks = stacks_of(self.tables, optimizer, shardings, num_shards, cores)
        if cores:
            log_refused(refused_tables(self.tables, optimizer, shardings, num_shards * cores))
        super().__init__(feature_config, stacks, mesh, axes, capacity)
        kernels = choose_row_kernels(row_kernels, self.stacks, self.mesh)
        self.row_kernels: dict[str, str] = {
            p.table.name: kernels[name] for name, stack in self.stacks.items() for p in stack.placements
        }
        self._program = StepProgram(self.stacks, self.mesh, self.axes, exchange, kernels)
        self._canonical = CanonicalTables(
            self.stacks, list(self.tables), self.mesh, self.axes, self._program.shardings()
        )

    def init(self, key: jax.Array) -> EmbeddingState:
        """A fresh state; the same tables from one key on every mesh."""
        tables, slots = self._program.init(key, initial_rows)
        whole = whole_tables(self.tables, key, self.abstract_canonical()[0])
        made = whole_slots(self.stacks.values())
        if whole or made:
            drawn, zeros = self._canonical.from_stacks(tables, slots)
            tables, slots = self._canonical.to_stacks(*self._canonical.checked(drawn | whole, zeros | made))
        weights = custom.initial_weights(self.tables, key)
        return EmbeddingState(tables, slots, *jax.device_put((jnp.int32(0), weights), self.replicated))

    def abstract_state(self) -> EmbeddingState:
        """Shapes, types and shardings of a state, for compiling ahead of time."""
        tables, slots = self._program.abstract()
        whole: Any = partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        weights = {name: whole(shape, jnp.float32) for name, shape in custom.weight_shapes(self.tables).items()}
        return EmbeddingState(tables, slots, whole((), jnp.int32), weights)

    def lookup(
        self,
        state: EmbeddingState,
        batch: ShardedBatch | Inputs,
        weights: ShardedWeights | Weights = None,
        *,
        count_bad_ids: bool = False,
        count_rounds: bool = False,
    ) -> ActivationTree:
        """Looks every input up, as `serving_embedding_lookup` does.

        Differentiable with respect to the weights and `state.combiner_weights` (and the tables, at the cost of
        whole ones); a custom combiner must then have finite gradients of empty bags, which rows left out by a mask are.

        Args:
          state: of this embedding.
          batch: a ShardedBatch, or inputs as of `serving_embedding_lookup`, which are then laid out here:
            ragged and sparse ones only outside of `jax.jit`.
          weights: those that `shard_batch` returned with the batch, or as of `serving_embedding_lookup`.
          count_bad_ids: also return how many ids of each feature were outside [0, V).
          count_rounds: also return how many rounds of all_to_all the lookup took, int32 by stack whose rows
            travel so: more than 1 where the batch overflows the window of a round. Nothing is dropped then;
            lookup and update take that many times as long.

        Returns:
          A structure like the batch, its dicts in the order of their keys, of activations, sharded over their first
          dimension; with counts a tuple.

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
        batch: ShardedBatch | Inputs,
        activation_gradients: ActivationTree,
        weights: ShardedWeights | Weights = None,
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
        given = batch.layout.skeleton.flatten(activation_gradients, "activation_gradients")
        gradients = checked_gradients(batch.layout, given)
        combiner_weights = state.combiner_weights
        if batch.valencies:
            outputs, _ = self._program.look_up(state.tables, batch, values)
            gradients, found = custom.pull_back(
                batch.layout, outputs, batch.valencies, combiner_weights, gradients
            )
            combiner_weights = custom.updated_weights(self.tables, combiner_weights, found)
        if called_values is None:
            called_values = called_now(self.stacks, state.step)
        tables, slots = self._program.update(
            state.tables, state.slots, batch, values, gradients, state.step, called_values
        )
        return EmbeddingState(tables, slots, state.step + 1, combiner_weights)

    def called_values(self) -> dict[str, Any]:
        """What learning rates and hyperparameters that are callables without arguments return now.

        A jitted step takes it as an argument and passes it to `apply_gradients`: the callables would otherwise be
        called only when the step is compiled. Each is called once, however many tables share it. With several hosts they
        must return the same on all.

        Returns:
          float32 scalars by stack; empty where there are no such callables.
        """
        return called_values(self.stacks)

    def predicted_bytes(self, batch: ShardedBatch) -> int:
        """Bytes that a device exchanges for a lookup and an update of a batch, as `engines.traffic` says."""
        return self._program.predicted_bytes(batch)

    def embedding_tables(self, state: EmbeddingState) -> dict[TableConfig, Table]:
        """The [V, D] tables by TableConfig, as `serving_embedding_lookup` takes them."""
        tables, _, _ = self.to_canonical(state)
        return {self.tables[name]: table for name, table in tables.items()}

    def slots(self, state: EmbeddingState) -> dict[str, dict[str, Table]]:
        """The slots by table name and TensorFlow's name of the slot, [V, D] each."""
        return self.to_canonical(state)[1]

    def to_canonical(
        self, state: EmbeddingState
    ) -> tuple[dict[str, Table], dict[str, dict[str, Table]], Scalar]:
        """Tables [V, D] by name, slots by table and slot name, and the step: the same on every mesh.

        Raises:
          ValueError: inside of `jax.jit` or `jax.eval_shape`, where the shard axes are not the first of the mesh, in its
            order; so, too, `embedding_tables`, `slots`, `from_canonical` of arrays on devices, and `init` of tables whose
            initializer draws them whole.
        """
        return *self._canonical.from_stacks(state.tables, state.slots), jnp.copy(state.step)

    def canonical_on_host(
        self, state: EmbeddingState
    ) -> tuple[dict[str, Table], dict[str, dict[str, Table]], Scalar]:
        """`to_canonical`, for saving: large arrays lie in the memory of the hosts, and take next to none of the devices.

        Not for `jax.jit`.
        """
        return *self._canonical.from_stacks_on_host(state.tables, state.slots), jnp.copy(state.step)

    def from_canonical(
        self,
        tables: Mapping[str, AnyTable],
        slots: Mapping[str, Mapping[str, AnyTable]],
        step: Any,
        combiner_weights: Mapping[str, AnyCombinerWeights] | None = None,
    ) -> EmbeddingState:
        """The state that `to_canonical` of any mesh gave, and its `combiner_weights`.

        Arrays that all lie in the host's memory, as of numpy or `canonical_on_host`, are put onto the devices by
        windows: a device takes the memory of its own rows and little more. Others are laid out anew on the devices.

        Raises:
          ValueError: if a table, slot or weight is missing or not of its shape, or as `to_canonical`.
        """
        tables, slots = self._canonical.checked(tables, slots)
        if (found := arrays_on_host((tables, slots))) is not None:
            with jax.ensure_compile_time_eval():
                new_tables, new_slots = read_stacks(self.stacks, self.abstract_state(), *found)
        else:
            new_tables, new_slots = self._canonical.to_stacks(tables, slots)
        weights = custom.checked_weights(self.tables, combiner_weights)
        small = jax.device_put((jnp.asarray(step, jnp.int32), weights), self.replicated)
        # Copied, since steps donate their state, and these may be arrays of the caller's.
        return EmbeddingState(new_tables, new_slots, *jax.tree.map(jnp.copy, small))

    def abstract_canonical(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Shapes, types and shardings of canonical tables and slots, without the values."""
        return self._canonical.abstract()
