"""Arrays as Orbax is to save them, and what is put into a step later."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.files import sync_folder, write_file
from jaxembed.checkpoint.scratch import scratch_folder

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


def amend_metadata(step: pathlib.Path, changes: dict[str, Any]) -> None:
    """Adds to the metadata of a step that is on the disk, which is whole at any time; for the only writer.

    Raises:
      CheckpointError: if its manifest cannot be read.
      OSError: if the disk fails.
    """
    manifest = layout.read_manifest(step)
    amended = layout.seal({**manifest, "metadata": {**manifest["metadata"], **changes}})
    # Written outside of the step, whose readers look at every file of it.
    with scratch_folder(step.parent, f"{step.name}-manifest") as scratch:
        write_file(scratch / "metadata", [json.dumps(amended).encode()])
        os.replace(scratch / "metadata", step / layout.MANIFEST / "metadata")
    sync_folder(step / layout.MANIFEST)
