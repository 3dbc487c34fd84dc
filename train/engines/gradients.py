"""Gradients of activations as a caller gave them, checked before any engine takes them."""

from typing import Any

import jax
import jax.numpy as jnp

from .batch import BatchLayout


def checked_gradients(layout: BatchLayout, gradients: list[Any]) -> list[jax.Array]:
    """Real arrays of the shapes of the activations.

    Args:
      layout: of the batch.
      gradients: one a feature.

    Raises:
      ValueError: if one is anything else.
    """
    found = []
    for feature, gradient in zip(layout.features, gradients, strict=True):
        shape = feature.output_shape if feature.combined_shape is None else feature.combined_shape
        of = f"gradient of feature {feature.path!r} must"
        if gradient is None:
            raise ValueError(
                f"{of} be an array, got None; that of an activation that the loss leaves out is zeros."
            )
        try:
            array = jnp.asarray(gradient)
        except (TypeError, ValueError):
            raise ValueError(f"{of} be an array, got {type(gradient).__name__}.") from None
        if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"{of} hold real numbers, got {array.dtype}.")
        if array.shape != shape:
            raise ValueError(f"{of} have the shape of its activation, {list(shape)}, got {list(array.shape)}.")
        found.append(array)
    return found
