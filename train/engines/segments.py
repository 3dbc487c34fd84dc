"""What happens to the sums of a stack's segments on one shard: the combiners' divisors, and the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .batch import BatchLayout, FeatureLayout

_DIVISORS = {"mean": 1, "sqrtn": 2}


def scale(
    features: tuple[FeatureLayout, ...], segments: jax.Array, weights: Any
) -> tuple[Any, jax.Array | None]:
    """What the sum of each segment is multiplied with: 1 / sum_i w_i of a mean, and so on.

        mean   1 / sum_i w_i            sqrtn  1 / sqrt(sum_i w_i^2)            1 / 0 = 0

    Args:
      features: of the stack.
      segments: [N] ascending.
      weights: [N], or None where all are 1.

    Returns:
      The weights to sum with, and float32 [S], or None where nothing is divided.
    """
    kinds = np.concatenate(
        [
            np.full(f.num_segments, _DIVISORS.get(f.bag.combiner, 0) if f.is_combined else 0, np.int8)
            for f in features
        ]
    )
    if not kinds.any():
        return weights, None
    given = jnp.ones(segments.shape, jnp.float32) if weights is None else weights
    is_square = jnp.asarray(kinds == 2).at[segments].get(mode="clip")
    total = segment_sum(jnp.where(is_square, given * given, given), segments, kinds.size)
    if weights is not None:
        # The inverse of a large sum, its square, or a gradient times it would be flushed to 0. Roots are no such numbers.
        shrink = jnp.where((kinds == 1) & (jnp.abs(total) > 2.0**32), 2.0**-80, 1.0).astype(jnp.float32)
        weights, total = weights * shrink.at[segments].get(mode="clip"), total * shrink
    root = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)
    divisor = jnp.where(kinds == 2, root, total)
    inverse = jnp.where(divisor == 0, 0, 1 / jnp.where(divisor == 0, 1, divisor))
    return weights, jnp.where(kinds == 0, 1, inverse)


def segment_sum(values: jax.Array, segments: jax.Array, num_segments: int) -> jax.Array:
    """Sums over entries in the order of their segments; those of padding are dropped."""
    return add_segments(jnp.zeros((num_segments, *values.shape[1:]), values.dtype), values, segments)


def add_segments(sums: jax.Array, values: jax.Array, segments: jax.Array, is_sorted: bool = True) -> jax.Array:
    """`sums` with the values added to their segments; those of padding are dropped."""
    return sums.at[segments].add(values, mode="drop", indices_are_sorted=is_sorted, wrap_negative_indices=False)


def split_features(layout: BatchLayout, sums: dict[str, jax.Array]) -> list[jax.Array]:
    """The [S_f, D] sums of each feature of the batch, in their tables' types; a stack may be wider than D.

    What a custom combiner takes stays float32.
    """
    return [
        sums[f.stack][f.first_segment : f.first_segment + f.num_segments, : f.feature.table.dim].astype(
            f.feature.table.dtype if f.combined_shape is None else jnp.float32
        )
        for f in layout.features
    ]


def join_features(layout: BatchLayout, gradients: list[jax.Array], stack: str, width: int) -> jax.Array:
    """From [S_f, D] a feature of the batch, the float32 [S, width] of a stack."""
    whole = jnp.concatenate(
        [g.astype(jnp.float32) for f, g in zip(layout.features, gradients, strict=True) if f.stack == stack]
    )
    return jnp.pad(whole, ((0, 0), (0, width - whole.shape[1]))) if width > whole.shape[1] else whole
