"""Puts what a checkpoint stores onto the devices of a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxembed.checkpoint import CheckpointError, layout
from jaxembed.checkpoint.digests import Digests
from jaxembed.checkpoint.reading import OpenedCheckpoint, check_model, flat_arrays
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.features import feature_tables

from .embedding import ShardedEmbedding
from .engines.placement import Stack
from .shard_writer import ShardWriter
from .state import EmbeddingState

#: On the host, of all local devices together.
WINDOW_BYTES = 32 << 20


def check_tables(embedding: ShardedEmbedding, opened: OpenedCheckpoint, may_grow: bool, partial: bool) -> bool:
    """Whether any table has more rows than the checkpoint.

    Args:
      may_grow: whether it may.
      partial: whether the checkpoint may have further tables.

    Raises:
      ValueError: if the tables do not fit.
    """
    stored, wanted = feature_tables(opened.feature_config), feature_tables(embedding.feature_config)
    grows = False
    for name, config in wanted.items():
        found = stored.get(name)
        if found is not None and (found.dim, found.dtype) == (config.dim, config.dtype):
            if found.vocabulary_size == config.vocabulary_size:
                continue
            if may_grow and found.vocabulary_size < config.vocabulary_size:
                grows = True
                continue
        raise ValueError(
            f"checkpoint {opened.directory} does not fit the feature configuration: table {name!r} must be "
            f"{config.dtype.name}[{config.vocabulary_size}, {config.dim}], the checkpoint has "
            + ("none." if found is None else f"{found.dtype.name}[{found.vocabulary_size}, {found.dim}].")
            + " Use the configuration it was saved with"
            + ("." if may_grow else ", or vocabulary_growth='initialize' for tables that have grown.")
        )
    if not partial and (left := sorted(stored.keys() - wanted.keys())):
        raise ValueError(
            f"checkpoint {opened.directory} has tables that the feature configuration has not: {left}; pass "
            "partial=True to leave them behind."
        )
    return grows


def check_slots(embedding: ShardedEmbedding, opened: OpenedCheckpoint, partial: bool) -> None:
    """Raises:
    ValueError: if slots are missing, or, unless `partial`, left over.
    """
    wanted: dict[str, Any] = embedding.abstract_canonical()[1]
    for name in embedding.tables:
        slots, found = wanted.get(name, {}), opened.slots.get(name, {})
        for slot in slots:
            if slot not in found:
                raise ValueError(
                    f"checkpoint {opened.directory} has no slot {slot!r} of table {name!r}, only "
                    f"{sorted(found)}; train on with the optimizer it was saved with."
                )
        if not partial and (left := sorted(found.keys() - slots.keys())):
            raise ValueError(
                f"checkpoint {opened.directory} has slots of table {name!r} that its optimizer has not: {left}; "
                "train on with the optimizer it was saved with, or pass partial=True to leave them behind."
            )


def restore_stacks(
    embedding: ShardedEmbedding,
    tables: Mapping[str, StoredArray],
    slots: Mapping[str, Mapping[str, StoredArray]],
    fresh: EmbeddingState | None,
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    """Tables and slots in the layout of the embedding's mesh, read by blocks of rows.

    A device takes the memory of its own rows, and the host a few blocks: no table is anywhere as a whole.

    Args:
      embedding: whose layout it is.
      tables: on disk, by name.
      slots: on disk, by table and slot name.
      fresh: rows for what the tables on disk have not; it is donated. None if they must have all.

    Raises:
      ValueError: if an array is of another shape or type.
      CheckpointError: if one is damaged.
    """
    abstract: Any = embedding.abstract_state()
    new = (fresh.tables, fresh.slots) if fresh else ({}, {})
    new_tables, new_slots = {}, {}
    for name, stack in embedding.stacks.items():
        members = {p.table.name: tables[p.table.name] for p in stack.placements}
        new_tables[name] = _restore(stack, abstract.tables[name], members, new[0].get(name))
        new_slots[name] = {
            slot: _restore(
                stack,
                leaf,
                {member: slots[member][slot] for member in members},
                new[1].get(name, {}).get(slot),
                stack.optimizer.slot_initial_values[slot],
            )
            for slot, leaf in abstract.slots[name].items()
        }
    return new_tables, new_slots


def _restore(
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


def restore_model(opened: OpenedCheckpoint, abstract: Any) -> Any:
    """The dense model, of the structure, types and shardings of `abstract`.

    Raises:
      ValueError: if it was saved with other leaves, shapes or types.
      CheckpointError: if it is damaged.
    """
    directory = opened.directory / layout.MODEL
    stored = opened.manifest["digests"].get(layout.MODEL)
    if stored is None:
        raise ValueError(f"checkpoint {opened.directory} has no model; it was not saved at this step.")
    wanted = flat_arrays(abstract)
    if wanted.keys() != stored.keys():
        raise ValueError(
            f"checkpoint {opened.directory}: model must have the leaves {sorted(wanted)}, got {sorted(stored)}."
        )
    for key, leaf in wanted.items():
        # Orbax casts and pads without a word.
        digests = Digests.from_json(stored[key], f"checkpoint {opened.directory}: model leaf {key!r}")
        shape, dtype = np.shape(leaf), np.dtype(getattr(leaf, "dtype", type(leaf))).name
        if (digests.shape, digests.dtype) != (shape, dtype):
            raise ValueError(
                f"checkpoint {opened.directory}: model leaf {key!r} must be {dtype}{list(shape)}, got "
                f"{digests.dtype}{list(digests.shape)}."
            )
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    handler: Any = ocp.PyTreeCheckpointHandler()  # is typed for paths of its own
    try:
        model = handler.restore(directory, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args))
    except Exception as e:  # Orbax and tensorstore raise many types
        raise CheckpointError(f"{directory} cannot be read: {str(e)[:300]}; restore another step.") from e
    if opened.verify:
        check_model(opened.directory, model, stored)
    return model


def restore_data(opened: OpenedCheckpoint) -> Any:
    """The state of the input pipeline, or None.

    Raises:
      CheckpointError: if it is damaged.
    """
    digest = opened.manifest["digests"].get(layout.DATA)
    return None if digest is None else layout.read_data(opened.directory, digest)
