"""Canonical rows of "mod"-sharded tables, a window at a time: memory beyond the result is that of a few windows.

Left to the compiler, interleaving the shards' rows takes some copies of a table, and all of it on every device
where the devices do not divide its rows. Here each device gets the next K of its canonical rows in a round: every
block of ids (a shard, or a SparseCore of one) has K / n of them, which lie one after the other.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .placement import LINE, Stack, TablePlacement

#: Of one device, in a round.
WINDOW_BYTES = 8 << 20
_AXES = ("rows", "columns", "parts")


def window_rows(
    stack: Stack, placement: TablePlacement, sharding: NamedSharding, trailing: tuple[int, ...]
) -> int:
    """K, a multiple of the blocks; 0 for arrays that need no windows, or are too small for them.

    Args:
      stack: of the table.
      placement: of the table.
      sharding: canonical, as of `canonical.canonical_sharding`.
      trailing: shape of a row of the array.
    """
    if stack.kind != "row" or placement.sharding != "mod" or stack.num_shards == 1:
        return 0
    row_bytes = 4 * math.prod(trailing)
    if placement.table.vocabulary_size * row_bytes <= WINDOW_BYTES:
        return 0
    local = placement.table.vocabulary_size // sharding.mesh.shape["rows"]
    wanted = max(WINDOW_BYTES * sharding.mesh.shape["columns"] // row_bytes, stack.num_blocks)
    return min(wanted, local) // stack.num_blocks * stack.num_blocks


def canonical_by_windows(
    stack: Stack,
    placement: TablePlacement,
    array: jax.Array,
    sharding: NamedSharding,
    trailing: tuple[int, ...],
    window: int,
) -> jax.Array:
    """The [V, ...] array of one table from that of its stack (rows or slots).

    Args:
      stack: of the table.
      placement: of the table, "mod".
      array: of the stack, sharded over its first dimension.
      sharding: of the result.
      trailing: shape of a row of the result.
      window: K, of `window_rows`.
    """
    devices: Any = sharding.mesh.devices
    rows, columns, copies = devices.shape
    parts = stack.num_shards // (rows * columns)
    devices = devices.reshape(rows, columns, parts, copies // parts)
    mesh = Mesh(devices, (*_AXES, "others"))
    num_local = placement.table.vocabulary_size // rows
    shape = (num_local, *trailing[:-1], trailing[-1] // columns) if trailing else (num_local,)

    def body(piece):
        own = lax.axis_index("rows") * num_local

        def step(index, out):
            start = jnp.minimum(index * window, num_local - window)

            def held_for(device):
                first_id = device // (columns * parts) * num_local + start
                held = _held(stack, placement, piece, first_id, window)
                if not trailing:
                    return held
                column = device // parts % columns * shape[-1]
                return lax.dynamic_slice_in_dim(held, column, shape[-1], held.ndim - 1)

            held = lax.map(held_for, jnp.arange(stack.num_shards, dtype=jnp.int32))
            rows = lax.all_to_all(held, _AXES, 0, 0, tiled=True).reshape(stack.num_blocks, -1, *shape[1:])
            # The block that holds the first row comes first.
            rows = jnp.roll(rows, -((own + start + placement.shift) % stack.num_blocks), axis=0)
            rows = rows.swapaxes(0, 1).reshape(window, *shape[1:])
            return lax.dynamic_update_slice_in_dim(out, rows, start, 0)

        return lax.fori_loop(0, -(-num_local // window), step, jnp.zeros(shape, piece.dtype))

    spec = PartitionSpec(*sharding.spec)
    return jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(_AXES), out_specs=spec, check_vma=False)(array)


def _held(stack: Stack, p: TablePlacement, piece: jax.Array, first_id: Any, window: int) -> jax.Array:
    """What this shard holds of the K ids from `first_id` on: [C, K / n, ...], C its blocks."""
    n, cores = stack.num_blocks, max(stack.cores, 1)
    found = []
    for core in range(cores):
        block = lax.axis_index(_AXES) * cores + core
        row = (first_id + (block - p.shift - first_id) % n) // n
        found.append(_rows(stack, piece, core * (stack.num_rows // cores) + p.first_row + row, window // n))
    return jnp.stack(found)


def _rows(stack: Stack, piece: jax.Array, row: Any, count: int) -> jax.Array:
    """`count` rows from `row` on; out of lines without laying all of them out anew."""
    if not stack.cores:
        return lax.dynamic_slice_in_dim(piece, row, count)
    num_lines = min(-(-count * stack.dim // LINE) + 1, piece.shape[0])
    # Lines times 128 might not fit int32.
    unit = LINE // math.gcd(LINE, stack.dim)
    line = row // unit * (stack.dim * unit // LINE) + row % unit * stack.dim // LINE
    first = jnp.minimum(line, piece.shape[0] - num_lines)
    offset = (line - first) * LINE + row % unit * stack.dim % LINE
    values = lax.dynamic_slice_in_dim(piece, first, num_lines).reshape(-1)
    return lax.dynamic_slice_in_dim(values, offset, count * stack.dim).reshape(count, stack.dim)
