"""From a configuration to the stacks of both engines: the axes, and who holds every table."""

from collections.abc import Mapping

from jax.sharding import Mesh

from jaxembed.config import TableConfig
from jaxembed.optimizers import Optimizer

from .placement import Stack, stack_tables
from .sparsecore_stacks import refused_tables, stack_on_sparsecores


def mesh_axes(mesh: Mesh, axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Axes of the mesh over which tables are sharded; all where none is named.

    Raises:
      ValueError: if it is no mesh, or an axis is not one of it, or named twice.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, such as of jax.make_mesh, got {mesh!r}.")
    if axis is None:
        return tuple(mesh.axis_names)
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or len(set(axes)) != len(axes) or not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"axis must name axes of the mesh, {mesh.axis_names}, got {axis!r}.")
    return axes


def stacks_of(
    tables: Mapping[str, TableConfig],
    optimizer: Optimizer | None,
    shardings: Mapping[str, str],
    num_shards: int,
    cores: int,
) -> dict[str, Stack]:
    """The stacks of both engines, by name.

    Args:
      tables: by name.
      optimizer: of the tables that have none of their own.
      shardings: by table.
      num_shards: n devices.
      cores: SparseCores of each; 0 leaves all tables to the `xla` engine.
    """
    if not cores:
        return {stack.name: stack for stack in stack_tables(tables, optimizer, shardings, num_shards)}
    refused = refused_tables(tables, optimizer, shardings, num_shards * cores)
    left = {name: table for name, table in tables.items() if name in refused}
    held = {name: table for name, table in tables.items() if name not in refused}
    stacks = (
        *stack_on_sparsecores(held, optimizer, num_shards, cores),
        *stack_tables(left, optimizer, shardings, num_shards),
    )
    return {stack.name: stack for stack in stacks}
