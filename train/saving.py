"""Arrays as Orbax is to save them."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxembed.checkpoint import layout

#: Small enough to be read a few at a time, large enough to be read fast.
CHUNK_BYTES = 4 << 20


def save_arrays(arrays: Any) -> Any:
    """What Orbax is to do with a tree of arrays."""
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
    return ocp.args.PyTreeSave(arrays, save_args=save_args)


def as_array(key: str, leaf: Any) -> Any:
    """A leaf of the dense model.

    Raises:
      ValueError: if it is not of numbers.
    """
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not jax.numpy.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise ValueError(f"model must hold arrays of numbers to be saved, got {array.dtype} at {key!r}.")
    return array


def encode(arrays: dict[str, Any]) -> dict[str, Any]:
    """With names that may be those of folders."""
    return {layout.encode_name(name): value for name, value in arrays.items()}
