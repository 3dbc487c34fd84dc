"""One compiled rung: packed buffers in, the model's outputs as numpy out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# An output array costs about 10 us on the way to numpy, copying 32 KiB in the program less than that.
_MERGED_BYTES = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function and how to take its outputs apart.

    Attributes:
      compiled: of the packed arguments.
      leaves: by leaf of the result: which output it is in, from which column to which, and its shape
        without the batch; columns None where it is an output of its own.
      treedef: structure of the result.
    """

    compiled: Any
    leaves: tuple[tuple[int, tuple[int, int] | None, tuple[int, ...]], ...]
    treedef: Any

    def __call__(self, rows: int, *args: Any) -> Any:
        """The result's first `rows` rows, as numpy."""
        outputs = [np.asarray(out)[:rows] for out in self.compiled(*args)]
        if self.is_one:
            return outputs[0]
        leaves = []
        for at, columns, shape in self.leaves:
            out = outputs[at]
            leaves.append(out if columns is None else out[:, slice(*columns)].reshape(rows, *shape))
        return jax.tree.unflatten(self.treedef, leaves)

    @functools.cached_property
    def is_one(self) -> bool:
        """Whether the result is an array."""
        return self.treedef.num_leaves == 1 and jax.tree_util.treedef_is_leaf(self.treedef)


def compile_program(function: Callable[..., Any], args: Sequence[Any], batch: int) -> Program:
    """Compiles `function` for CPU at the shapes of `args`.

    Small outputs of one type are merged into one array, and taken apart on the host.

    Args:
      function: to be traced; a pytree of arrays with leading dimension `batch`.
      args: arrays and ShapeDtypeStructs.
      batch: B.

    Raises:
      ValueError: if an output has no leading dimension B.
    """
    recipe: dict[str, Any] = {}

    def merged(*args):
        paths, recipe["treedef"] = jax.tree.flatten_with_path(function(*args))
        for path, leaf in paths:
            shape = np.shape(leaf)
            if not shape or shape[0] != batch:
                raise ValueError(
                    f"model must return arrays with leading dimension B, got shape {list(shape)} for B = {batch} "
                    f"at output{jax.tree_util.keystr(path)}."
                )
        outputs, recipe["leaves"] = _merge([jnp.asarray(leaf) for _, leaf in paths], batch)
        return outputs

    compiled = jax.jit(merged).lower(*args).compile()
    return Program(compiled, tuple(recipe["leaves"]), recipe["treedef"])


def _merge(leaves: list[jax.Array], batch: int) -> tuple[list[jax.Array], list[Any]]:
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(i)
    outputs: list[jax.Array] = []
    places: list[Any] = [None] * len(leaves)
    for members in groups.values():
        if sum(leaves[i].nbytes for i in members) > _MERGED_BYTES * len(members) or len(members) == 1:
            for i in members:
                places[i] = (len(outputs), None, leaves[i].shape[1:])
                outputs.append(leaves[i])
            continue
        start = 0
        for i in members:
            width = math.prod(leaves[i].shape[1:])
            places[i] = (len(outputs), (start, start + width), leaves[i].shape[1:])
            start += width
        outputs.append(jnp.concatenate([leaves[i].reshape(batch, -1) for i in members], axis=1))
    return outputs, places
