"""Initial tables, shard by shard: no device ever holds a whole table, and no mesh changes the values."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxembed.config import TableConfig
from jaxembed.initializers import Constant, RandomNormal, RandomUniform, TruncatedNormal

from .placement import Stack

#: Initializers whose components are independent and of one distribution, so that each row may be drawn alone.
_BY_ROW = (Constant, RandomNormal, RandomUniform, TruncatedNormal)
_ROWS_AT_A_TIME = 1 << 16


def draws_by_row(table: TableConfig) -> bool:
    """Whether the rows of a table are initialized one by one, each from a key of its own."""
    return type(table.initializer) in _BY_ROW


def table_key(key: jax.Array, table: TableConfig) -> jax.Array:
    """The key of one table, which other tables do not change."""
    return jax.random.fold_in(key, zlib.crc32(table.name.encode()))


def whole_tables(
    tables: Mapping[str, TableConfig], key: jax.Array, like: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """[V, D] of the tables that are not drawn by row, by name.

    Args:
      tables: all of them, by name.
      key: of all tables.
      like: their canonical arrays, by name: they take the sharding of these.
    """
    found = {}
    for name, table in tables.items():
        if not draws_by_row(table):
            initializer: Any = table.initializer
            draw = jax.jit(initializer, static_argnums=(1, 2), out_shardings=like[name].sharding)
            found[name] = draw(table_key(key, table), (table.vocabulary_size, table.dim), table.dtype)
    return found


def whole_slots(stacks: Iterable[Stack]) -> dict[str, dict[str, jax.Array]]:
    """Slots by table and slot name where the optimizer's `slot_variable_creation_fn` makes them."""
    return {
        p.table.name: stack.optimizer.init_slots((p.table.vocabulary_size, p.table.dim))
        for stack in stacks
        if stack.optimizer.slot_variable_creation_fn is not None
        for p in stack.placements
    }


def initial_rows(stack: Stack, key: jax.Array, shard: Any) -> jax.Array:
    """This shard's piece of a stack; zeros where a table's initializer needs the whole shape.

    Args:
      stack: which.
      key: of all tables.
      shard: index of the shard.
    """
    if stack.cores:
        blocks = [_initial_block(stack, key, shard * stack.cores + core) for core in range(stack.cores)]
        return jnp.concatenate(blocks)
    return _initial_block(stack, key, shard)


def _initial_block(stack: Stack, key: jax.Array, shard: Any) -> jax.Array:
    """The rows of a shard, or of a SparseCore."""
    columns = stack.dim // stack.num_shards if stack.kind == "column" else stack.dim
    pieces = []
    for p in stack.placements:
        if not draws_by_row(p.table):
            pieces.append(jnp.zeros((p.rows, columns), stack.dtype))
            continue
        draw, own_key = p.table.initializer, table_key(key, p.table)
        assert draw is not None

        def row(id, p=p, draw=draw, own_key=own_key):
            values = draw(jax.random.fold_in(own_key, id), (p.table.dim,), stack.dtype)
            if stack.kind == "column":
                return lax.dynamic_slice(values, (shard * columns,), (columns,))
            return jnp.pad(values, (0, stack.dim - p.table.dim))

        ids = stack.ids_on_block(p, shard)
        rows = lax.map(row, ids, batch_size=min(_ROWS_AT_A_TIME, p.rows))
        # Rows of no id stay zero, and a table on one shard leaves nothing on the others.
        pieces.append(jnp.where((ids < p.table.vocabulary_size)[:, None], rows, 0).astype(stack.dtype))
    return _lay_out(stack, pieces, shard)


def _lay_out(stack: Stack, pieces: list[jax.Array], shard: Any) -> jax.Array:
    if all(p.sharding != "table" for p in stack.placements):
        whole = jnp.concatenate(pieces)
        missing = stack.num_rows // max(stack.cores, 1) - whole.shape[0]
        return jnp.pad(whole, ((0, missing), (0, 0)))
    out = jnp.zeros((stack.num_rows, stack.dim), stack.dtype)
    for p, piece in zip(stack.placements, pieces, strict=True):
        # Tables on one shard each overlap those on others: only its own shard writes a table.
        old = lax.dynamic_slice_in_dim(out, p.first_row, p.rows)
        mine = (shard == p.shift) | (p.sharding != "table")
        out = lax.dynamic_update_slice_in_dim(out, jnp.where(mine, piece, old), p.first_row, 0)
    return out
