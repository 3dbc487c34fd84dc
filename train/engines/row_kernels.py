"""How rows of a piece of a table are read and updated: by XLA, or by the kernels of `pallas_rows` where they can."""

import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed import optimizers
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer

from .placement import Stack

_LOG = logging.getLogger("jaxembed")
_LANES = 128
#: What may read and update rows.
ROW_KERNELS = ("xla", "pallas")
#: Where these kernels compile.
_PLATFORMS = ("tpu",)
_RULES = (SGD, Adagrad, AdagradMomentum, FTRL, Adam)


def holds(dtype: Any, dim: int) -> bool:
    """Whether rows of a table lie so that each can be copied by itself: float32, D a multiple of 128."""
    return dtype == jnp.float32 and dim % _LANES == 0 and dim > 0


def why_not(optimizer: Optimizer, dtype: Any, dim: int) -> str | None:
    """Why the rows of such a table are not updated here, or None where they are."""
    if not holds(dtype, dim):
        return f"rows of {jnp.dtype(dtype).name} [{dim}], not float32 of a multiple of {_LANES}"
    if type(optimizer) not in _RULES:
        return f"the rule of {type(optimizer).__name__}"
    if not optimizer.is_lazy:
        return "an optimizer that updates every row"
    if not optimizer.use_gradient_accumulation:
        return "occurrences of an id applied one by one"
    return None


def check_row_kernels(row_kernels: str, stacks: Iterable[Stack], device: Any) -> None:
    """Checks the choice, and says which tables it leaves to XLA.

    Args:
      row_kernels: one of `ROW_KERNELS`.
      stacks: all of them.
      device: of the mesh.

    Raises:
      ValueError: if there is no such choice, or it is not one for such a device.
    """
    if row_kernels not in ROW_KERNELS:
        raise ValueError(f"row_kernels must be one of {tuple(ROW_KERNELS)}, got {row_kernels!r}.")
    if row_kernels == "xla":
        return
    if device.platform not in _PLATFORMS:
        raise ValueError(
            f"row_kernels={row_kernels!r} needs TPUs, got devices of the platform {device.platform!r}; use 'xla'."
        )
    refused = {}
    for stack in stacks:
        columns = stack.dim // stack.num_shards if stack.kind == "column" else stack.dim
        reason = why_not(stack.optimizer, stack.dtype, columns)
        if stack.cores:
            reason = "held by SparseCores"
        elif stack.kind == "replicated":
            reason = "replicated"
        if reason:
            refused |= {p.table.name: reason for p in stack.placements}
    if refused:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
        _LOG.warning("Tables whose rows XLA updates in spite of row_kernels=%r: %s.", row_kernels, reasons)


def take_rows(row_kernels: str, table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [N, D] of a table [R, D]; numbers outside [0, R) are clipped."""
    if row_kernels == "xla" or not holds(table.dtype, table.shape[1]):
        return table.at[rows].get(mode="clip", wrap_negative_indices=False)
    # Not at the top: importing Pallas takes a fifth of a second.
    from . import pallas_rows

    return pallas_rows.gather(table, rows)


def is_by_kernel(row_kernels: str, optimizer: Optimizer, table: jax.Array) -> bool:
    """Whether `update_unique` takes a kernel."""
    return row_kernels != "xla" and why_not(optimizer, table.dtype, table.shape[1]) is None


def update_unique(
    row_kernels: str,
    optimizer: Optimizer,
    table: jax.Array,
    slots: Any,
    rows: jax.Array,
    sums: jax.Array,
    learning_rate: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`jaxembed.optimizers.update_unique`, by a kernel where one can."""
    arguments = (optimizer, table, slots, rows, sums, learning_rate, step)
    if not is_by_kernel(row_kernels, optimizer, table):
        return optimizers.update_unique(*arguments)
    from . import pallas_rows

    return pallas_rows.update_unique(*arguments)
