"""embedding_bag: the one primitive that every lookup is made of.

A `Bag` says how ids are laid out and combined (static); `BagOperands` holds the arrays. For bag b,
with entries i in bag b that are valid and not pruned, w_i = 1 where there are no weights:

    sum    out[b] = sum_i w_i table[ids_i]
    mean   out[b] = sum_i w_i table[ids_i] / sum_i w_i
    sqrtn  out[b] = sum_i w_i table[ids_i] / sqrt(sum_i w_i^2)          (x / 0 = 0)

accumulated in float32 and returned in the table's type. With `sequence_length` L > 0 nothing is
combined: out[b, l] is the row of the entry at position l of bag b, zeros where there is none,
entries at positions >= L dropped unseen, entries at one position added; weights are not used.

Id policy: an id outside [0, V) that no pruning removed contributes zeros (it stays out of a mean's
divisor, too) and adds one to the feature's count of bad ids. It never reads another row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed import bag_native, bag_xla
from jaxembed.backends import lookup_path
from jaxembed.config import COMBINERS
from jaxembed.inputs.ids import signed_ids
from jaxembed.splits import SplitsRow

Layout = Literal["dense", "ragged", "sparse"]
LAYOUTS = get_args(Layout)


@dataclasses.dataclass(frozen=True)
class Bag:
    """The static half of one embedding_bag.

    Args:
      layout: where an entry's bag is written. "dense": entry i is bag i, not combined. "ragged":
        `BagOperands.bags` is [B + 1] row splits; entries before the first split and from the last
        one on are padding, so features may share one buffer of ids. "sparse":
        `bags` is [N] row ids, sorted or not, and rows outside [0, B) are padding.
      num_bags: B.
      combiner: "sum", "mean" or "sqrtn"; unused where nothing is combined.
      sequence_length: L, or 0 to combine. A sparse layout then also needs `columns`.
      prune_ids: drop entries with id < 0.
      prune_weights: drop entries whose weight is not above 0, NaN among them.

    Raises:
      ValueError: if layout or combiner are none of these.
    """

    layout: Layout
    num_bags: int
    combiner: str = "sum"
    sequence_length: int = 0
    prune_ids: bool = False
    prune_weights: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}.")
        # A CustomCombiner, which lookups apply to the rows of a sequence, passes through here.
        if isinstance(self.combiner, str) and self.combiner not in COMBINERS:
            raise ValueError(f"combiner must be one of {COMBINERS}, got {self.combiner!r}.")


class BagOperands(NamedTuple):
    """The arrays of one embedding_bag.

    Attributes:
      table: [V, D] float32, bfloat16 or float16 array, or a quantized table.
      ids: [N] int32 or int64.
      bags: [B + 1] row splits or a SplitsRow (ragged), [N] row ids (sparse), or None (dense).
      columns: [N] positions in the sequence, for sparse sequences, else None.
      weights: [N] floating point, or None.
    """

    table: Any
    ids: Any
    bags: Any = None
    columns: Any = None
    weights: Any = None


def embedding_bags(
    bags: Sequence[Bag], operands: Sequence[BagOperands], path: str | None = None
) -> tuple[list[jax.Array], jax.Array]:
    """Runs many embedding_bags at once; on CPU, one call of the native kernel where it is available.

    Of tables of types that the kernel does not have, and of no others, they are plain JAX.

    Args:
      bags: F static halves.
      operands: their F dynamic halves.
      path: of `jaxembed.backends.lookup_path`, which is the default.

    Returns:
      F arrays ([B, D]; [B, L, D] for sequences; [N, D] for the dense layout) in their tables' types, and
      the int32 [F] counts of bad ids.

    Raises:
      ValueError: if ids, bags or columns are no integers, or `path` is "native" and the kernel has no tables of a type.
    """
    bags, operands = tuple(bags), tuple(_signed(op) for op in operands)
    path = path or lookup_path()
    if path == "native":
        bag_native.check_tables(operands)
    pairs = list(zip(bags, operands, strict=True))
    native = [i for i, (bag, op) in enumerate(pairs) if path != "xla" and bag_native.supports([bag], [op])]
    if not native:
        return bag_xla.embedding_bags(bags, operands)
    if len(native) == len(pairs):
        return bag_native.embedding_bags(bags, operands, in_exports=path == "native")
    others = [i for i in range(len(pairs)) if i not in native]
    by_kernel = bag_native.embedding_bags([bags[i] for i in native], [operands[i] for i in native])
    by_xla = bag_xla.embedding_bags([bags[i] for i in others], [operands[i] for i in others])
    order = np.argsort(native + others)
    outputs, counts = [*by_kernel[0], *by_xla[0]], jnp.concatenate([by_kernel[1], by_xla[1]])
    return [outputs[i] for i in order], counts[order]


def row_gradients(bag: Bag, operands: BagOperands, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient of one embedding_bag with respect to its table, as rows: no [V, D] array is made.

    `jax.grad` gives the dense gradient; it is the sum of these rows at their ids. `jaxembed.optimizers`'
    `sparse_update` takes both as they are.

    Args:
      bag: the static half.
      operands: the dynamic half.
      gradient: with respect to the output, in its shape.

    Returns:
      [N] ids and float32 [N, D] gradients with respect to the row that each looked up, weights and divisor
      applied. Entries that are padding, pruned or bad have id V and gradient 0.
    """
    return bag_xla.row_gradients(bag, _signed(operands), gradient)


def _signed(operands: BagOperands) -> BagOperands:
    bags = operands.bags
    parts = {"ids": operands.ids, "bags": getattr(bags, "splits", bags), "columns": operands.columns}
    for name, array in parts.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}; convert them before the lookup.")
    bags = bags.signed() if isinstance(bags, SplitsRow) else signed_ids(bags)
    return operands._replace(ids=signed_ids(operands.ids), bags=bags, columns=signed_ids(operands.columns))
