"""ShardedInputs: batches laid out over the shards of a mesh, on one host or several."""

import dataclasses
import math
import threading
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed import structure
from jaxembed.preprocessing import preprocess
from jaxembed.shapes import AnyPerExample, Inputs, Weights
from jaxembed.validation import check_ids

from .engines import custom
from .engines.batch import BatchLayout, PackedBatch, ShardedBatch, ShardedWeights
from .engines.host_shards import check_host_shards, hosts_of_shards
from .engines.matching import Plan, is_traced, plan_batch
from .engines.packing import pack_on_host, unpack_weights, widen
from .engines.packing_traced import pack_in_trace
from .engines.placement import Stack, places_of
from .engines.sparsecore_packing import SparseCorePacking


class ShardedInputs:
    """The part of a ShardedEmbedding that lays its batches out, and remembers how much room they needed.

    Args:
      feature_config: a structure of FeatureConfig.
      stacks: the stacked tables, by name.
      mesh: of the devices.
      axes: of the mesh, over which a batch is sharded.
      capacity: entries that a shard has room for in each stack; None takes what the batches need.

    Raises:
      ValueError: if `capacity` is not of this form, or several hosts share a shard or have unequally many.
    """

    def __init__(
        self,
        feature_config: Any,
        stacks: Mapping[str, Stack],
        mesh: Mesh,
        axes: tuple[str, ...],
        capacity: int | None,
    ):
        if capacity is not None and (
            not isinstance(capacity, int | np.integer) or isinstance(capacity, bool) or capacity < 1
        ):
            raise ValueError(f"capacity must be None or an int of at least 1, got {capacity!r}.")
        if (num_hosts := jax.process_count()) > 1:
            check_host_shards(hosts_of_shards(mesh, axes), num_hosts, axes, mesh.axis_names)
        self.feature_config: Any = feature_config
        self.stacks: dict[str, Stack] = dict(stacks)
        self._places = places_of(self.stacks)
        self.mesh: Mesh = mesh
        self.axes: tuple[str, ...] = axes
        self.num_shards: int = math.prod(mesh.shape[axis] for axis in axes)
        self._sparsecore = SparseCorePacking()
        self._capacity_lock = threading.Lock()
        self._capacity = dict.fromkeys(self.stacks, int(capacity or 0))
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

    def shard_batch(
        self, batch: Inputs, weights: Weights = None, mask: AnyPerExample | None = None
    ) -> tuple[ShardedBatch, ShardedWeights | None]:
        """Lays a batch out over the shards, on the host; call it outside of `jax.jit`.

        With several hosts, each passes its own rows, as many on each, and all get the one global batch. They agree
        on its shapes, so all of them must call it on the same batches in the same order, on one thread;
        `pack_batch`, `agree` and `place_batch` are its parts. That waits for the step that runs, but where `capacity` is
        fixed, or `agree` is called a step or two before `place_batch`. With a fixed capacity, and no SparseCores, hosts
        ask each other nothing, and batches of other features or numbers of rows on one of them go unnoticed.

        Args:
          batch: inputs as of `serving_embedding_lookup`; raw ids where a feature has preprocessing.
          weights: likewise.
          mask: [B], 0 for rows of padding, as `Batch.mask`: whatever ids they hold, nothing is looked up, updated or
            counted for them, as for a bag without ids. It is of the features whose activations are [B, ...]: B rows, or k
            an example with an `output_shape` of (B, ...). Others keep all of their rows.

        Returns:
          What `lookup` and `apply_gradients` take; both the weights, which are None where no feature has any.

        Raises:
          ValueError: if they do not fit the configuration, the mask no feature, or the entries of a shard the fixed
            capacity.
        """
        return self._shard(self._plan(batch, weights, mask))

    def pack_batch(
        self, batch: Inputs, weights: Weights = None, mask: AnyPerExample | None = None
    ) -> PackedBatch:
        """The host's half of `shard_batch`: for a thread of its own, while a step runs.

        Args:
          batch: as of `shard_batch`.
          weights: likewise.
          mask: likewise.

        Raises:
          ValueError: as `shard_batch`.
        """
        return self._pack(self._plan(batch, weights, mask))

    @property
    def packs_alone(self) -> bool:
        """Whether `pack_batch` asks no other host, and so may run on a thread; with SparseCores it does ask."""
        return jax.process_count() == 1 or not any(stack.cores for stack in self.stacks.values())

    def agree(self, packed: PackedBatch) -> jax.Array | None:
        """Starts to agree with the other hosts on how many entries a shard has room for, and that batches are alike.

        These are the same features with as many rows, combined and weighted alike; with a fixed capacity nothing is
        agreed on, nor compared here. With SparseCores `pack_batch` has compared them.

        A computation over all hosts: each must call it on its part of the same batch, in the same order.
        It does not wait; begun a step or two before its `place_batch`, it costs no time.

        Returns:
          int32, for `place_batch`, or None on one host and with a fixed capacity.
        """
        if jax.process_count() == 1 or self._is_capacity_fixed:
            return None
        # A batch of dense ids alone, too, has the room that batches before it needed, as far as this host knows. As long
        # on all hosts, whatever their batches have.
        room = [packed.room.get(stack, 0) for stack in self.stacks]
        forms = self._forms(packed.batch.layout, packed.batch.is_weighted)
        own = np.asarray([room, forms, np.negative(forms)], np.int32)
        local = np.tile(own.reshape(-1), (self._num_local_shards(), 1))
        return self._largest(jax.make_array_from_process_local_data(self.batch_sharding, local))

    def place_batch(
        self, packed: PackedBatch, agreed: jax.Array | None = None
    ) -> tuple[ShardedBatch, ShardedWeights | None]:
        """The devices' half of `shard_batch`.

        Args:
          packed: what `pack_batch` returned.
          agreed: what `agree` returned for it.

        Raises:
          ValueError: on all hosts, if they have different features, numbers of rows or combiners, or weights on some only.
        """
        if agreed is not None:
            largest, most, least = np.asarray(agreed).reshape(3, -1)
            self._refuse_others(packed.batch.layout, most != -least)
            room = dict(zip(self.stacks, largest.tolist(), strict=True))
            self.reserve(room)
            packed = widen(packed, self.stacks, {stack: room[stack] for stack in packed.room})
        put = partial(jax.make_array_from_process_local_data, self.batch_sharding)
        placed = jax.tree.map(put, packed.batch)
        return placed, None if packed.weights is None else ShardedWeights(jax.tree.map(put, packed.weights))

    @property
    def capacities(self) -> dict[str, int]:
        """Entries that a shard has room for, by stack, as the batches so far needed them."""
        return dict(self._capacity)

    def reserve(self, capacities: Mapping[str, int]) -> None:
        """Makes room for at least these, so that a resumed run compiles the programs that it was in."""
        if self._is_capacity_fixed:
            return
        with self._capacity_lock:
            for stack in self._capacity:
                self._capacity[stack] = max(self._capacity[stack], int(capacities.get(stack, 0)))

    def abstract_batch(
        self, batch: Inputs, weights: Weights = None, mask: AnyPerExample | None = None
    ) -> tuple[ShardedBatch, ShardedWeights | None]:
        """Shapes, types and shardings of what `shard_batch` returns for a batch, for compiling ahead of time.

        The devices of the mesh need not be there: `jax.experimental.topologies` describes them.
        """
        packed = self._pack(self._plan(batch, weights, mask))
        hosts = jax.process_count()

        def abstract(x):
            shape = (x.shape[0] * hosts, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.batch_sharding)

        weights = packed.weights
        weights = None if weights is None else ShardedWeights(jax.tree.map(abstract, weights))
        return jax.tree.map(abstract, packed.batch), weights

    def unshard_weights(
        self,
        gradients: ShardedWeights,
        batch: Inputs,
        weights: Weights,
        mask: AnyPerExample | None = None,
    ) -> Weights:
        """Gradients of sharded weights in the form of the weights that the caller gave, on the host.

        Args:
          gradients: with respect to the weights of `shard_batch(batch, weights, mask)`.
          batch: what was passed to `shard_batch`.
          weights: likewise.
          mask: likewise; of a batch that `Trainer.shard_batch` laid out, its `Batch.mask`. With another one, or none,
            gradients come back at the wrong weights: they do not say which rows had entries.

        Returns:
          A structure like `weights`.

        Raises:
          ValueError: with several hosts, none of which has all gradients.
        """
        if (num_hosts := jax.process_count()) > 1:
            raise ValueError(
                f"unshard_weights needs the gradients of all devices on one host, got {num_hosts} hosts; use the "
                "ShardedWeights as they are, or run in one process."
            )
        plan = self._plan(batch, weights, mask)
        values = jax.tree.map(np.asarray, gradients.values)
        flat = unpack_weights(plan, self.stacks, values, self.num_shards)
        leaves = [
            item.weights if value is None else _with_values(item.weights, value)
            for item, value in zip(plan.items, flat, strict=True)
        ]
        return structure.pack(weights, iter(leaves), own_order=True)

    def _pack(self, plan: Plan) -> PackedBatch:
        num_shards = self._num_local_shards()
        if not self.packs_alone:
            # Before the hosts agree on the limits of the stacks that they have.
            weighted = any(lookup.operands.weights is not None for lookup in plan.lookups)
            forms = multihost_utils.process_allgather(np.asarray(self._forms(plan.layout, weighted), np.int32))
            self._refuse_others(plan.layout, (forms != forms[0]).any(0))
        packed = pack_on_host(plan, self.stacks, range(num_shards), self._room, self._sparsecore)
        valencies = custom.valencies_on_host(plan.layout, plan.lookups, plan.live_rows, num_shards)
        return dataclasses.replace(packed, batch=dataclasses.replace(packed.batch, valencies=valencies))

    def _num_local_shards(self) -> int:
        return self.num_shards // jax.process_count()

    def _forms(self, layout: BatchLayout, is_weighted: bool) -> list[int]:
        return [_digest(layout, stack, is_weighted) for stack in self.stacks]

    def _refuse_others(self, layout: BatchLayout, differ: np.ndarray) -> None:
        """Raises ValueError where hosts differ in what they pass of a stack: bool by stack."""
        for stack, differs in zip(self.stacks, differ, strict=True):
            if differs:
                rows = {f.path: f.num_rows // jax.process_count() for f in layout.of_stack(stack)}
                raise ValueError(
                    "each host must pass the same features with as many rows, combined and weighted alike, got others on other "
                    f"hosts: in stack {stack!r} this one has the rows {rows}; give all the same, filled up with rows that a mask "
                    "leaves out, and weights of 1 where only others have any."
                )

    def _plan(self, batch: Any, weights: Any, mask: Any = None) -> Plan:
        batch = preprocess(batch, self.feature_config, mask)
        return plan_batch(batch, weights, self.feature_config, self.stacks, jax.process_count(), mask)

    def _shard(self, plan: Plan) -> tuple[ShardedBatch, ShardedWeights | None]:
        if is_traced(plan):
            return pack_in_trace(plan, self.stacks, self.num_shards), None
        packed = self._pack(plan)
        return self.place_batch(packed, self.agree(packed))

    def _sharded(self, batch: Any, weights: Any, refuse_bad_ids: bool = False) -> tuple[ShardedBatch, Any]:
        if not isinstance(batch, ShardedBatch):
            plan = self._plan(batch, weights)
            if refuse_bad_ids:
                for item, lookup in zip(plan.items, plan.lookups, strict=True):
                    check_ids(item.path, item.feature.table, lookup)
            batch, weights = self._shard(plan)
        batch.layout.check_places(self._places)
        return batch, batch.checked_weights(weights)

    def _room(self, stack: str, num_entries: int) -> int:
        """How many entries a shard has room for in a stack; few different numbers, so few compilations."""
        with self._capacity_lock:  # batches are packed on several threads
            if not self._is_capacity_fixed and num_entries > self._capacity[stack]:
                self._capacity[stack] = _next_capacity(num_entries)
            room = self._capacity[stack]
        if num_entries > room:
            raise ValueError(
                f"a shard has {num_entries} ids to look up in stack {stack!r}, more than the capacity of {room}; pass a "
                "larger capacity to ShardedEmbedding."
            )
        return max(room, 8)


def _digest(layout: BatchLayout, stack: str, is_weighted: bool) -> int:
    """Of what a batch decides of the program of a stack: 31 bits, so that its negative is an int32, too."""
    form = [
        (f.path, f.num_rows, f.inner, f.output_shape, f.combined_shape, f.is_combined and f.bag.combiner)
        for f in layout.of_stack(stack)
    ]
    return zlib.crc32(repr((is_weighted, form)).encode()) & 0x7FFFFFFF


def _next_capacity(num_entries: int) -> int:
    """The next of numbers in steps of 8, later of a thirty-second to a sixty-fourth."""
    step = 1 << max(math.ceil(math.log2(max(num_entries, 1))) - 6, 3)
    return -(-num_entries // step) * step


def _with_values(weights: Any, values: np.ndarray) -> Any:
    values = values.astype(weights.dtype)
    return dataclasses.replace(weights, values=values)
