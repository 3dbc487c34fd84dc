"""The native path of a row-sparse update: one call of a C++ kernel, in place, on one CPU device."""

import ctypes
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed.backends import backend
from jaxembed.kernel import library
from jaxembed.optimizers.base import Optimizer, Slots
from jaxembed.optimizers.rules import SGD, Adagrad

TARGET = "jaxembed_update_rows"


@functools.cache
def available() -> bool:
    """Whether the kernel can be called."""
    path = library()
    if path is None:
        return False
    try:
        handler = ctypes.CDLL(str(path)).JaxembedUpdateRows
    except (OSError, AttributeError):
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    except RuntimeError:
        return False
    return True


def supports(optimizer: Optimizer, table: Any) -> bool:
    """Whether the kernel covers this update: SGD and Adagrad, float32, duplicates of an id summed."""
    return (
        type(optimizer) in (SGD, Adagrad)
        and optimizer.use_gradient_accumulation
        and table.dtype == jnp.float32
        and table.shape[0] > 0
        and backend() == "native"
        and available()
    )


def update_entries(
    optimizer: Optimizer,
    table: jax.Array,
    slots: Slots,
    rows: jax.Array,
    segments: jax.Array,
    weights: jax.Array | None,
    gradients: jax.Array,
    learning_rate: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One step on the rows that entries name, each once, with the sum of its entries' gradients.

        g[r] = sum over entries i with rows[i] == r of weights[i] gradients[segments[i]]

    In a program that has the table and slots donated, they are updated in place.

    Args:
      optimizer: one that `supports` covers.
      table: float32 [V, D].
      slots: its slots.
      rows: int32 [N]; entries with a row outside [0, V) are padding.
      segments: int32 [N]; entries with a segment outside [0, S) are padding.
      weights: float32 [N], or None for 1.
      gradients: float32 [S, D].
      learning_rate: float32 scalar.

    Returns:
      The table and slots, updated.
    """
    decay = jnp.float32(optimizer.weight_decay_factor or 0.0)
    if optimizer.multiply_weight_decay_factor_by_learning_rate:
        decay = decay * learning_rate
    bounds = (
        _or(optimizer.clip_gradient_min, -math.inf),
        _or(optimizer.clip_gradient_max, math.inf),
        _or(optimizer.clip_weight_min, -math.inf),
        _or(optimizer.clip_weight_max, math.inf),
    )
    scalars = jnp.stack([learning_rate, decay, *map(jnp.float32, bounds)])
    names = optimizer.slot_names
    accumulators = slots[names[0]] if names else jnp.zeros((0, table.shape[1]), jnp.float32)
    weights = jnp.zeros(0, jnp.float32) if weights is None else weights
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table, accumulators)]
    call = jax.ffi.ffi_call(TARGET, outputs, input_output_aliases={0: 0, 1: 1})
    table, accumulators = call(table, accumulators, rows, segments, weights, gradients, scalars)
    return table, dict.fromkeys(names, accumulators)


def _or(bound: float | None, default: float) -> float:
    return default if bound is None else bound
