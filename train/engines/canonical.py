"""Between the stacks of one mesh and canonical tables [V, D], which know nothing of meshes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .placement import Stack, TablePlacement
from .windows import canonical_by_windows, canonical_on_host, is_large, on_host, windows_of


class CanonicalTables:
    """Converts between the state of one mesh and canonical tables and slots.

    Args:
      stacks: by name.
      names: of all tables, in canonical order.
      mesh: of the stacks.
      axes: over which they are sharded.
      shardings: of tables and slots by stack.
    """

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        names: Sequence[str],
        mesh: Mesh,
        axes: tuple[str, ...],
        shardings: Any,
    ):
        self._stacks, self._mesh, self._axes = stacks, mesh, axes
        others = tuple(axis for axis in mesh.axis_names if axis not in axes)
        order = [mesh.axis_names.index(axis) for axis in (*axes, *others)]
        # A jitted program takes devices in one order only: there it is that of the shards, to callers the mesh's.
        self._is_reordered = order != sorted(order)
        self._inner_mesh = Mesh(mesh.devices.transpose(order), (*axes, *others))
        self._stack_shardings = shardings
        inner = jax.tree.map(lambda s: NamedSharding(self._inner_mesh, s.spec), shardings)
        self._inner_stack_shardings = inner if self._is_reordered else shardings
        places = {p.table.name: (stack, p) for stack in stacks.values() for p in stack.placements}
        self._places = {name: places[name] for name in names}
        abstract_tables, abstract_slots = self._abstract(self._inner_sharding)
        self._inner_shardings = _shardings((abstract_tables, abstract_slots))
        #: By table and slot; the slot of a table itself is "".
        self._inner = {(name, ""): leaf for name, leaf in abstract_tables.items()}
        self._inner |= {
            (name, slot): leaf for name, leaves in abstract_slots.items() for slot, leaf in leaves.items()
        }
        self._programs: dict[Any, Any] = {}
        self._to_stacks_jit = jax.jit(self._to_stacks, out_shardings=self._inner_stack_shardings)

    def abstract(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Shapes, types and shardings of tables and slots."""
        return self._abstract(self._mesh_sharding if self._is_reordered else self._inner_sharding)

    def _inner_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return canonical_sharding(self._inner_mesh, self._axes, shape)

    def _mesh_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Over whole axes of the mesh, in its own order of devices."""
        rows, columns, num_rows, num_columns = [], [], 1, 1
        for axis in self._axes:
            size = self._mesh.shape[axis]
            if not columns and shape[0] % (num_rows * size) == 0:
                rows, num_rows = [*rows, axis], num_rows * size
            elif shape[1:] and shape[1] % (num_columns * size) == 0:
                columns, num_columns = [*columns, axis], num_columns * size
        spec: tuple[Any, ...] = (tuple(rows) or None, tuple(columns) or None)
        return NamedSharding(self._mesh, PartitionSpec(*spec[: len(shape)]))

    def _abstract(self, sharding_of: Callable[[tuple[int, ...]], NamedSharding]) -> Any:
        def leaf(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(shape))

        tables, slots = {}, {}
        for name, (stack, p) in self._places.items():
            vocabulary = p.table.vocabulary_size
            shape = (vocabulary, p.table.dim)
            tables[name] = leaf(shape, stack.dtype)
            slots[name] = {
                slot: leaf(stack.optimizer.slot_shape(slot, shape), jnp.float32)
                for slot in stack.optimizer.slot_names
            }
        return tables, slots

    def from_stacks(self, tables: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> Any:
        """Tables and slots by table, from those by stack.

        Raises:
          ValueError: inside of `jax.jit` or `jax.eval_shape`, where the shards are in another order than the mesh's devices.
        """
        self._check_order()
        program = self._program(tuple(self._inner))
        if not self._is_reordered:
            return self._by_table(program(tables, slots))
        inner = jax.device_put((tables, slots), self._inner_stack_shardings)
        return jax.device_put(self._by_table(program(*inner)), _shardings(self.abstract()))

    def from_stacks_on_host(self, tables: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> Any:
        """`from_stacks` into the memory of the hosts, so that devices need no room for it.

        Beside the state, devices hold a few windows of "mod"-sharded tables, and of others one array at a time.
        Arrays that are not split by whole rows stay on devices: several hosts put these together to digest them.
        """
        if self._is_reordered:
            return self.from_stacks(tables, slots)
        found, rest = {}, []
        for key, leaf in self._inner.items():
            stack, p = self._places[key[0]]
            windows = windows_of(stack, p, leaf.sharding, leaf.shape[1:])
            if not is_large(leaf) or leaf.sharding.shard_shape(leaf.shape)[1:] != leaf.shape[1:]:
                rest.append(key)
            elif windows:
                found[key] = canonical_on_host(windows, p, _array_of(stack, key, tables, slots))
            else:
                found |= jax.device_put(self._program((key,))(tables, slots), {key: on_host(leaf.sharding)})
        return self._by_table(found | self._program(tuple(rest))(tables, slots))

    def checked(self, tables: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> Any:
        """The tables and slots of this configuration, where they lie.

        Raises:
          ValueError: if one is missing or not of its shape and type.
        """
        expected_tables, expected_slots = self.abstract()
        return (
            {name: _fit(f"table {name!r}", tables.get(name), leaf) for name, leaf in expected_tables.items()},
            {
                name: {
                    slot: _fit(f"slot {slot!r} of table {name!r}", slots.get(name, {}).get(slot), leaf)
                    for slot, leaf in expected.items()
                }
                for name, expected in expected_slots.items()
            },
        )

    def to_stacks(self, tables: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> Any:
        """Tables and slots by stack, from those that `checked` returned: on the devices, where they take as much again.

        Raises:
          ValueError: as `from_stacks`.
        """
        self._check_order()
        arrays = jax.tree.map(
            lambda array, leaf: (
                array if isinstance(array, jax.core.Tracer) else jax.device_put(array, leaf.sharding)
            ),
            (tables, slots),
            self.abstract(),
        )
        if not self._is_reordered:
            return self._to_stacks_jit(*arrays)
        inner = jax.device_put(arrays, self._inner_shardings)
        return jax.device_put(self._to_stacks_jit(*inner), self._stack_shardings)

    def _check_order(self) -> None:
        # In a program's trace a constant, too, is traced.
        if self._is_reordered and isinstance(jnp.zeros(()), jax.core.Tracer):
            raise ValueError(
                f"tables over the axes {self._axes} of a mesh of {self._mesh.axis_names} cannot be converted from or to "
                "canonical ones inside of jax.jit or jax.eval_shape, where a program keeps to one order of devices; do it "
                "outside, take abstract_canonical for the shapes, or name those axes first, and in this order, in the mesh."
            )

    def _program(self, keys: tuple[tuple[str, str], ...]) -> Callable[..., dict[tuple[str, str], jax.Array]]:
        """Of tables and slots by stack, to some of the canonical arrays."""
        if keys not in self._programs:

            def convert(tables, slots):
                return {key: self._from_stack(key, tables, slots) for key in keys}

            shardings = {key: self._inner[key].sharding for key in keys}
            self._programs[keys] = jax.jit(convert, out_shardings=shardings)
        return self._programs[keys]

    def _from_stack(self, key: tuple[str, str], tables, slots) -> jax.Array:
        (stack, p), leaf = self._places[key[0]], self._inner[key]
        array = _array_of(stack, key, tables, slots)
        windows = windows_of(stack, p, leaf.sharding, leaf.shape[1:])
        if windows:
            return canonical_by_windows(windows, p, array)
        return self._gathered(stack, key, table_of_stack(stack, p, array))

    def _gathered(self, stack: Stack, key: tuple[str, str], array: jax.Array) -> jax.Array:
        """A canonical array, whole on every device where it is split by columns over some of them.

        XLA finds no better way between such a sharding and a stack's, unless by "mod", and would warn of taking
        this one.
        """
        sharding = self._inner[key].sharding
        rows, columns, _ = sharding.mesh.axis_sizes
        is_split = columns == 1 or rows * columns == stack.num_shards
        if is_split or (self._places[key[0]][1].sharding == "mod" and is_large(array)):
            return array
        return lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))

    def _by_table(self, arrays: Mapping[tuple[str, str], Any]) -> tuple[dict, dict]:
        slots = {name: self._places[name][0].optimizer.slot_names for name in self._places}
        return (
            {name: arrays[name, ""] for name in self._places},
            {name: {slot: arrays[name, slot] for slot in names} for name, names in slots.items()},
        )

    def _to_stacks(self, tables, slots):
        by_stack, slots_by_stack = {}, {}
        for name, stack in self._stacks.items():
            members = [p.table.name for p in stack.placements]
            by_stack[name] = stack_of_tables(
                stack, {member: self._gathered(stack, (member, ""), tables[member]) for member in members}
            )
            slots_by_stack[name] = {
                slot: stack_of_tables(
                    stack,
                    {member: self._gathered(stack, (member, slot), slots[member][slot]) for member in members},
                    stack.optimizer.slot_initial_values[slot],
                )
                for slot in stack.optimizer.slot_names
            }
        return by_stack, slots_by_stack


def _array_of(stack: Stack, key: tuple[str, str], tables: Any, slots: Any) -> Any:
    return slots[stack.name][key[1]] if key[1] else tables[stack.name]


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _fit(what: str, array: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape != leaf.shape or dtype != leaf.dtype:
        found = "nothing" if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(f"{what} must be {leaf.dtype}{list(leaf.shape)}, got {found}.")
    return array


def canonical_sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """How a canonical array is spread: over as many shards as divide its rows, then its columns.

    JAX shards only dimensions that the number of shards divides. Give large tables a vocabulary_size that
    is a multiple of the number of devices: each then holds whole rows of its own.

    Args:
      mesh: whose first axes are `axes`.
      axes: over which the tables are sharded.
      shape: of the array.
    """
    n = math.prod(mesh.shape[axis] for axis in axes)
    rows = math.gcd(shape[0], n)
    columns = math.gcd(shape[1], n // rows) if len(shape) > 1 else 1
    split = Mesh(mesh.devices.reshape(rows, columns, -1), ("rows", "columns", "copies"))
    spec = ("rows" if rows > 1 else None, "columns" if columns > 1 else None)
    # Slots may have one number a row.
    return NamedSharding(split, PartitionSpec(*spec[: len(shape)]))


def table_of_stack(stack: Stack, placement: TablePlacement, array: jax.Array) -> jax.Array:
    """The [V, ...] array of one table from that of its stack (rows or slots)."""
    n, p, vocabulary = stack.num_blocks, placement, placement.table.vocabulary_size
    if stack.kind != "row":
        return lax.slice_in_dim(array, p.first_row, p.first_row + vocabulary)
    array = stack.rows_of(array)
    trailing = array.shape[1:]
    rows = array.reshape(n, -1, *trailing)[:, p.first_row : p.first_row + p.rows]
    if p.sharding == "table":
        return rows[p.shift]
    if p.sharding == "mod":
        rows = jnp.roll(rows, -p.shift, axis=0).swapaxes(0, 1)
    rows = rows.reshape(n * p.rows, *trailing)[:vocabulary]
    return rows[:, : p.table.dim] if stack.cores else rows


def stack_of_tables(stack: Stack, tables: Mapping[str, jax.Array], padding: float = 0) -> jax.Array:
    """The array of a stack from the [V, ...] arrays of its tables; rows of no id are zero.

    Columns of padding are `padding`: a zero would be divided by where an optimizer's slot starts from more.
    """
    n = stack.num_blocks
    some = next(iter(tables.values()))
    if stack.kind != "row":
        return jnp.concatenate([tables[p.table.name] for p in stack.placements])
    trailing = some.shape[1:]
    everywhere, whole = [], {}
    for p in stack.placements:
        rows = tables[p.table.name]
        if stack.cores:
            rows = jnp.pad(rows, ((0, 0), (0, stack.dim - p.table.dim)), constant_values=padding)
            trailing = rows.shape[1:]
        if p.sharding == "table":
            whole.setdefault(p.shift, []).append(rows)
            continue
        rows = _pad_rows(rows, n * p.rows)
        if p.sharding == "mod":
            rows = rows.reshape(p.rows, n, *trailing).swapaxes(0, 1)
            rows = jnp.roll(rows, p.shift, axis=0)
        everywhere.append(rows.reshape(n, p.rows, *trailing))
    if whole:
        size = stack.num_rows - sum(rows.shape[1] for rows in everywhere)
        empty = [jnp.zeros((0, *trailing), some.dtype)]
        everywhere.append(
            jnp.stack([_pad_rows(jnp.concatenate(whole.get(shard, empty)), size) for shard in range(n)])
        )
    if stack.cores:
        size = stack.num_rows // stack.cores - sum(rows.shape[1] for rows in everywhere)
        everywhere.append(jnp.zeros((n, size, *trailing), some.dtype))
    return jnp.concatenate(everywhere, axis=1).reshape(stack.shape(trailing))


def _pad_rows(array: Any, num_rows: int) -> jax.Array:
    return jnp.pad(array, ((0, num_rows - array.shape[0]), *[(0, 0)] * (array.ndim - 1)))
