"""How rows of a piece of a table are read and updated: by XLA, or by the kernels of `pallas_rows` where they can."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxembed import optimizers
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer

from .placement import Stack

_LOG = logging.getLogger("jaxembed")
_LANES = 128
#: What may read and update rows; "auto" is one of the others.
ROW_KERNELS = ("auto", "xla", "pallas")
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


def choose_row_kernels(row_kernels: str, stacks: Mapping[str, Stack], mesh: Mesh) -> dict[str, str]:
    """What reads and updates the rows of each stack, "xla" or "pallas".

    Args:
      row_kernels: one of `ROW_KERNELS`. "pallas" says which tables it leaves to XLA. "auto" takes kernels on TPUs where
        they can, once each process has tried them on a device of its own (`row_trial`); where the devices are only
        described, for compiling ahead of time, there is nothing to try them on.
      stacks: by name.
      mesh: of the devices.

    Returns:
      By name of the stack.

    Raises:
      ValueError: if there is no such choice, or it is not one for such a device.
    """
    if row_kernels not in ROW_KERNELS:
        raise ValueError(f"row_kernels must be one of {ROW_KERNELS}, got {row_kernels!r}.")
    platform = mesh.devices.flat[0].platform
    if row_kernels == "pallas" and platform not in _PLATFORMS:
        raise ValueError(
            f"row_kernels={row_kernels!r} needs TPUs, got devices of the platform {platform!r}; use 'auto' or 'xla'."
        )
    chosen = dict.fromkeys(stacks, "xla")
    if row_kernels == "xla" or platform not in _PLATFORMS:
        return chosen
    reasons = {name: _stays(stack) for name, stack in stacks.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if row_kernels == "pallas":
        _say_left(
            {p.table.name: reasons[name] for name in stacks if reasons[name] for p in stacks[name].placements}
        )
    elif device := _device_at_hand(mesh):
        from .row_trial import agreed, try_kernels

        kinds = {name: _kind(stacks[name]) for name in able}
        tried = list(dict.fromkeys(kinds.values()))
        passed = agreed(mesh, [try_kernels(*kind, device).is_passed for kind in tried])
        verdicts = dict(zip(tried, passed, strict=True))
        able = [name for name in able if verdicts[kinds[name]]]
    return chosen | dict.fromkeys(able, "pallas")


def _stays(stack: Stack) -> str | None:
    """Why a stack stays with XLA, or None."""
    if stack.cores:
        return "held by SparseCores"
    if stack.kind == "replicated":
        return "replicated"
    return why_not(stack.optimizer, stack.dtype, _columns(stack))


def _columns(stack: Stack) -> int:
    """D of a device's piece."""
    return stack.dim // stack.num_shards if stack.kind == "column" else stack.dim


def _kind(stack: Stack) -> tuple[Optimizer, int]:
    """What a trial of the kernels depends on: rates are numbers that they are given."""
    return dataclasses.replace(stack.optimizer, learning_rate=1.0), _columns(stack)


def _device_at_hand(mesh: Mesh) -> Any:
    """A device of the mesh that this process has, or None."""
    try:
        own = jax.local_devices(backend=mesh.devices.flat[0].platform)
    except RuntimeError:  # Of a described topology, whose platform may not be there.
        return None
    return next((device for device in mesh.devices.flat if device in own), None)


def _say_left(reasons: Mapping[str, str | None]) -> None:
    if reasons:
        text = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        _LOG.warning("Tables whose rows XLA updates in spite of row_kernels='pallas': %s.", text)


def take_rows(row_kernels: str, table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [N, D] of a table [R, D]; numbers outside [0, R) are clipped."""
    if row_kernels == "xla":
        return table.at[rows].get(mode="clip", wrap_negative_indices=False)
    # Not at the top: importing Pallas takes a fifth of a second.
    from . import pallas_rows

    return pallas_rows.gather(table, rows)


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
    if row_kernels == "xla":
        return optimizers.update_unique(*arguments)
    from . import pallas_rows

    return pallas_rows.update_unique(*arguments)
