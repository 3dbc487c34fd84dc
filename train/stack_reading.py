"""Canonical arrays, on disk or in the host's memory, onto the devices of a mesh, by blocks of rows."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import numpy as np

from jaxembed.checkpoint.stored import StoredArray

from .engines.placement import Stack
from .shard_writer import ShardWriter
from .state import EmbeddingState

#: On the host, of all local devices together.
WINDOW_BYTES = 32 << 20


def read_stacks(
    stacks: Mapping[str, Stack],
    abstract: Any,
    tables: Mapping[str, StoredArray],
    slots: Mapping[str, Mapping[str, StoredArray]],
    fresh: EmbeddingState | None = None,
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    """Tables and slots by stack, in the layout of a mesh, read by blocks of rows.

    A device takes the memory of its own rows, and the host a few blocks: no table is anywhere as a whole.

    Args:
      stacks: by name.
      abstract: the state of that mesh, an EmbeddingState without the values.
      tables: canonical, by name.
      slots: likewise, by table and slot name.
      fresh: rows for what the tables have not; it is donated. None if they must have all.

    Raises:
      ValueError: if an array is of another shape or type.
      CheckpointError: if one is damaged.
    """
    new = (fresh.tables, fresh.slots) if fresh else ({}, {})
    new_tables, new_slots = {}, {}
    for name, stack in stacks.items():
        members = {p.table.name: tables[p.table.name] for p in stack.placements}
        new_tables[name] = _read(stack, abstract.tables[name], members, new[0].get(name))
        new_slots[name] = {
            slot: _read(
                stack,
                leaf,
                {member: slots[member][slot] for member in members},
                new[1].get(name, {}).get(slot),
                stack.optimizer.slot_initial_values[slot],
            )
            for slot, leaf in abstract.slots[name].items()
        }
    return new_tables, new_slots


def arrays_on_host(arrays: Any) -> Any:
    """A pytree of arrays that all lie in this host's memory, to be read by blocks; None if some do not.

    Args:
      arrays: numpy arrays, or `jax.Array`s.
    """
    if not all(_is_on_host(array) for array in jax.tree.leaves(arrays)):
        return None
    return jax.tree.map(lambda array: StoredArray("canonical array", np.asarray(array)), arrays)


def _is_on_host(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return False
    return array.sharding.memory_kind == "pinned_host" and array.is_fully_addressable


def _read(
    stack: Stack,
    leaf: jax.ShapeDtypeStruct,
    stored: Mapping[str, StoredArray],
    fresh: jax.Array | None,
    padding: float = 0,
) -> jax.Array:
    sharding = leaf.sharding
    assert sharding is not None
    shard_shape = sharding.shard_shape(leaf.shape)
    before = {} if fresh is None else {shard.device: shard.data for shard in fresh.addressable_shards}
    places, writers = [], []
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    cores = max(stack.cores, 1)
    for device, index in indices.items():
        rows, *columns = index or (slice(None),)
        shard = (rows.start or 0) // shard_shape[0] if stack.kind == "row" else 0
        writer = ShardWriter(
            shard_shape, leaf.dtype, device, before.get(device), WINDOW_BYTES // max(len(indices) * cores, 1)
        )
        writers.append(writer)
        for core in range(cores):
            places.append((shard * cores + core, core * (stack.num_rows // cores), columns, writer))
    for p in stack.placements:
        array = stored[p.table.name]
        trailing = (p.table.dim,) if stack.cores else leaf.shape[1:]
        _check_form(array, (p.table.vocabulary_size, *trailing), leaf.dtype, fresh is not None)
        shares = [
            (stack.share(p, block), base + p.first_row, columns, writer)
            for block, base, columns, writer in places
        ]
        held = [share for share, *_ in shares if share]
        if not held:
            continue
        first, stop = min(share[0] for share in held), max(share[-1] for share in held) + 1
        for start, rows in array.blocks(start=first, stop=stop):
            if stack.cores:
                missing = stack.dim - p.table.dim
                rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=padding) if missing else rows
            for share, first_row, columns, writer in shares:
                low = _index_from(share, start)
                part = share[low : _index_from(share, start + rows.shape[0])]
                if part:
                    piece = rows[part[0] - start : part[-1] - start + 1 : part.step]
                    writer.write(first_row + low, piece if stack.cores else piece[(slice(None), *columns)])
    pieces = [writer.finish() for writer in writers]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)


def _check_form(array: StoredArray, shape: tuple[int, ...], dtype: np.dtype, may_grow: bool) -> None:
    grown = may_grow and array.shape[1:] == shape[1:] and array.shape[0] < shape[0]
    if (array.shape != shape and not grown) or array.dtype != dtype:
        raise ValueError(f"{array.what} must be {dtype}{list(shape)}, got {array.dtype}{list(array.shape)}.")


def _index_from(ids: range, start: int) -> int:
    """How many of the ids are below `start`."""
    return min(max(-(-(start - ids.start) // ids.step), 0), len(ids))
