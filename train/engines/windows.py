"""Canonical rows of "mod"-sharded tables, a window at a time: memory beyond the result is that of a few windows.

Left to the compiler, interleaving the shards' rows takes some copies of a table, and all of it on every device
where the devices do not divide its rows. Here each device gets the next K of its canonical rows in a round: every
block of ids (a shard, or a SparseCore of one) has K / n of them, which lie one after the other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from .placement import LINE, Stack, TablePlacement

#: Of one device, in a round.
WINDOW_BYTES = 8 << 20
_AXES = ("rows", "columns", "parts")


def is_large(array: Any) -> bool:
    """Whether an array, or one that has its shape and type, is larger than a window."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize > WINDOW_BYTES


def windows_of(
    stack: Stack, placement: TablePlacement, sharding: NamedSharding, trailing: tuple[int, ...]
) -> "Windows | None":
    """None for arrays that need no windows, or are too small for them.

    Args:
      stack: of the table.
      placement: of the table.
      sharding: canonical, as of `canonical.canonical_sharding`.
      trailing: shape of a row of the array.
    """
    if stack.kind != "row" or placement.sharding != "mod" or stack.num_shards == 1:
        return None
    row_bytes, num_rows = 4 * math.prod(trailing), placement.table.vocabulary_size
    if num_rows * row_bytes <= WINDOW_BYTES:
        return None
    wanted = max(WINDOW_BYTES * sharding.mesh.shape["columns"] // row_bytes, stack.num_blocks)
    size = min(wanted, num_rows // sharding.mesh.shape["rows"]) // stack.num_blocks * stack.num_blocks
    return Windows(stack, num_rows, sharding, trailing, size) if size else None


@dataclasses.dataclass(frozen=True)
class Windows:
    """The canonical rows of one array of a "mod"-sharded table, K of every device at a time.

    Attributes:
      stack: of the table.
      num_rows: V.
      sharding: of the canonical array.
      trailing: shape of a canonical row.
      size: K, a multiple of the blocks.
    """

    stack: Stack
    num_rows: int
    sharding: NamedSharding
    trailing: tuple[int, ...]
    size: int

    @property
    def num_local(self) -> int:
        """Canonical rows of one device."""
        return self.num_rows // self.sharding.mesh.shape["rows"]

    @property
    def count(self) -> int:
        """How many windows there are; the last overlaps the one before it where K does not divide the rows."""
        return -(-self.num_local // self.size)

    @property
    def local_row(self) -> tuple[int, ...]:
        """Shape of the part of a row that a device has."""
        if not self.trailing:
            return ()
        return (*self.trailing[:-1], self.trailing[-1] // self.sharding.mesh.shape["columns"])

    def start(self, index: Any) -> Any:
        """The first local row of a window."""
        last = self.num_local - self.size
        return min(index * self.size, last) if isinstance(index, int) else jnp.minimum(index * self.size, last)

    def rows(self, piece: jax.Array, start: Any, first_row: Any, shift: Any) -> jax.Array:
        """This device's K canonical rows from its `start` on, [K, ...]; in a `shard_map` of `sharded`.

        Args:
          piece: of the stack's array, this device's.
          start: the same on all devices.
          first_row: of the table's placement.
          shift: likewise.
        """
        stack, column = self.stack, (self.local_row or (1,))[-1]
        columns, parts = (lax.axis_size(name) for name in _AXES[1:])

        def held_for(device):
            first_id = device // (columns * parts) * self.num_local + start
            held = _held(stack, piece, first_id, self.size, first_row, shift)
            if not self.trailing:
                return held
            first_column = device // parts % columns * column
            return lax.dynamic_slice_in_dim(held, first_column, column, held.ndim - 1)

        held = lax.map(held_for, jnp.arange(stack.num_shards, dtype=jnp.int32))
        rows = lax.all_to_all(held, _AXES, 0, 0, tiled=True).reshape(stack.num_blocks, -1, *self.local_row)
        # The block that holds the first row comes first.
        own = lax.axis_index("rows") * self.num_local
        rows = jnp.roll(rows, -((own + start + shift) % stack.num_blocks), axis=0)
        return rows.swapaxes(0, 1).reshape(self.size, *self.local_row)

    def sharded(self, body: Callable[..., jax.Array], num_scalars: int = 0) -> Callable[..., jax.Array]:
        """`body` on every device: of its piece of the stack and scalars, to its part of a canonical array."""
        devices: Any = self.sharding.mesh.devices
        rows, columns, copies = devices.shape
        parts = self.stack.num_shards // (rows * columns)
        mesh = Mesh(devices.reshape(rows, columns, parts, copies // parts), (*_AXES, "others"))
        in_specs = (PartitionSpec(_AXES), *[PartitionSpec()] * num_scalars)
        out_specs = PartitionSpec(*self.sharding.spec)
        return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def canonical_by_windows(windows: Windows, placement: TablePlacement, array: jax.Array) -> jax.Array:
    """The [V, ...] array of one table from that of its stack (rows or slots), in a program."""

    def body(piece):
        def step(index, out):
            start = windows.start(index)
            rows = windows.rows(piece, start, placement.first_row, placement.shift)
            return lax.dynamic_update_slice_in_dim(out, rows, start, 0)

        out = jnp.zeros((windows.num_local, *windows.local_row), piece.dtype)
        return lax.fori_loop(0, windows.count, step, out)

    return windows.sharded(body)(array)


def canonical_on_host(windows: Windows, placement: TablePlacement, array: jax.Array) -> jax.Array:
    """The same in the hosts' memory: devices need that of two windows, each host that of its devices' rows."""
    local: dict[Any, np.ndarray] = {}  # by device
    pending: list[tuple[int, jax.Array]] = []

    def take():
        start, rows = pending.pop(0)
        for shard in rows.addressable_shards:
            if shard.device not in local:
                local[shard.device] = np.empty((windows.num_local, *windows.local_row), array.dtype)
            local[shard.device][start : start + windows.size] = np.asarray(shard.data)

    for index in range(windows.count):
        start = windows.start(index)
        rows = _one_window(windows)(array, *map(np.int32, (start, placement.first_row, placement.shift)))
        for shard in rows.addressable_shards:
            shard.data.copy_to_host_async()
        pending.append((start, rows))
        if len(pending) > 1:
            take()
    take()
    shape, sharding = (windows.num_rows, *windows.trailing), on_host(windows.sharding)
    pieces = [
        jax.device_put(local.pop(device), SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        for device in list(local)
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same devices' memory of the host."""
    return sharding.with_memory_kind("pinned_host")


@functools.lru_cache(maxsize=64)
def _one_window(windows: Windows) -> Callable[..., jax.Array]:
    """Tables of one size share the program."""
    return jax.jit(windows.sharded(windows.rows, 3))


def _held(stack: Stack, piece: jax.Array, first_id: Any, window: int, first_row: Any, shift: Any) -> jax.Array:
    """What this shard holds of the K ids from `first_id` on: [C, K / n, ...], C its blocks."""
    n, cores = stack.num_blocks, max(stack.cores, 1)
    found = []
    for core in range(cores):
        block = lax.axis_index(_AXES) * cores + core
        row = (first_id + (block - shift - first_id) % n) // n
        found.append(_rows(stack, piece, core * (stack.num_rows // cores) + first_row + row, window // n))
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
