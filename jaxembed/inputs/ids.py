"""Ids on the host: which arrays live there, and how 64-bit ids enter a program that computes in 32."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def is_host(array: Any) -> bool:
    """Whether `array` is a numpy array."""
    return isinstance(array, np.ndarray)


def is_concrete(array: Any) -> bool:
    """Whether `array` has values that can be looked at now, outside of a trace."""
    return not isinstance(array, jax.core.Tracer)


def check_unmasked(what: str, array: Any) -> None:
    """Raises ValueError of a masked array with entries that its mask hides: numpy would drop the mask, and show them."""
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError(
            f"{what} is a masked array with {np.ma.count_masked(array)} masked entries, whose mask would be lost; pass "
            "its filled(...), or its compressed()."
        )


def native_order(array: Any) -> Any:
    """A host array in this processor's order of bytes, which is all that JAX takes."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def narrow_ids(array: Any) -> Any:
    """64-bit host integers as int32, saturated, unless JAX computes in 64 bits; other arrays as `native_order`.

    `jax.jit` would wrap them around, so that id 2**32 + 5 reads row 5. A vocabulary is smaller than
    2**31 - 1, so a saturated id stays out of range, and a negative one stays negative.
    """
    if (
        isinstance(array, np.ndarray)
        and array.dtype.kind in "iu"
        and array.dtype not in (np.int32, np.int16, np.int8, np.uint16, np.uint8)
        and not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    ):
        return np.clip(array, -(2**31), 2**31 - 1).astype(np.int32)
    return native_order(array)


def signed_ids(array: Any) -> Any:
    """Integers of any other type as int32, or int64 where they need it; those too large for it saturate."""
    array = narrow_ids(array)
    if array is None or array.dtype in (np.int32, np.int64):
        return array
    if array.dtype == np.uint64:
        return jnp.minimum(array, np.uint64(2**63 - 1)).astype(np.int64)
    if array.dtype == np.uint32:
        return jnp.minimum(array, np.uint32(2**31 - 1)).astype(np.int32)
    return array.astype(np.int32)
