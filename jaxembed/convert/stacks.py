"""What stacks of SparseCore need besides the rows of their tables: slots of one optimizer, and padding that divides."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxembed.convert.interface import Contents, Stream
from jaxembed.convert.mapped import new_mapped
from jaxembed.features import feature_tables
from jaxembed.optimizers import optimizer_from_dict

ACCUMULATORS = "accumulators"
#: What accumulators start from where no optimizer is known, as by default in TensorFlow, jax-tpu-embedding and here.
INITIAL_ACCUMULATOR = 0.1


def common_slots(stack: str, slots: Mapping[str, Iterable[str]]) -> list[str]:
    """The names of the slots that each table of a stack has.

    Args:
      stack: its name.
      slots: names by table.

    Raises:
      ValueError: if they differ from table to table.
    """
    (first, names), *others = ((table, sorted(found)) for table, found in slots.items())
    for table, found in others:
        if found != names:
            raise ValueError(
                f"the tables of stack {stack!r} must have one optimizer: {first!r} has the slots {names}, "
                f"{table!r} {found}."
            )
    return names


def new_stack(file: pathlib.Path, shape: tuple[int, ...], stream: Stream, contents: Contents) -> np.ndarray:
    """A new stack in a mapped file, filled with what its padding is to be.

    Padding is trained on gradients of zero: an accumulator of zero would be a divisor of 0 / 0. As in the libraries that
    read it, and in `jaxembed.train`, it starts from what its slot starts from.

    Args:
      file: a new one.
      shape: of the stack.
      stream: the array of one of its tables.
      contents: that it is of.

    Raises:
      OSError: as `new_mapped`.
    """
    whole, padding = new_mapped(file, stream.dtype, shape), _padding(stream, contents)
    if padding:
        whole[...] = padding
    return whole


def _padding(stream: Stream, contents: Contents) -> float:
    if stream.slot is None:
        return 0.0
    optimizer: Any = feature_tables(contents.feature_config)[stream.table].optimizer
    stored = contents.optimizers.get(stream.table)
    try:
        initial = (optimizer_from_dict(stored) if stored else optimizer).slot_initial_values
    except (ValueError, LookupError, TypeError, AttributeError):  # none, or one that is not registered here
        initial = {}
    return initial.get(stream.slot, INITIAL_ACCUMULATOR if stream.slot == ACCUMULATORS else 0.0)
