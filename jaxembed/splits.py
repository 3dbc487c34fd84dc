"""Row splits that features share."""

import dataclasses
from typing import Any

import jax

from jaxembed.inputs.ids import signed_ids


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class SplitsRow:
    """The row splits [B + 1] of one of F features, to be passed wherever these may be.

    The native kernel reads them in place; sliced apart they would cost a copy and a step of the program for
    each feature.

    Args:
      splits: [F, B + 1] int32 or int64.
      row: the feature.
    """

    splits: Any
    row: int

    def signed(self) -> "SplitsRow":
        """With splits that are int32 or int64."""
        return SplitsRow(signed_ids(self.splits), self.row)

    def __jax_array__(self) -> jax.Array:
        return self.splits[self.row]

    def tree_flatten(self) -> tuple[tuple[Any], int]:
        """The array, and what is static."""
        return (self.splits,), self.row

    @classmethod
    def tree_unflatten(cls, row: int, children: tuple[Any]) -> "SplitsRow":
        """The inverse."""
        return cls(children[0], row)
