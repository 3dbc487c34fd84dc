"""The shapes of the dense inputs of a model."""

from collections.abc import Iterable, Mapping
from typing import Any


def dense_shapes(shapes: Mapping[str, Any], argument: str) -> dict[str, tuple[int, ...]]:
    """By name the shape of one row.

    Args:
      shapes: by name, ints; an int K for [K].
      argument: how errors name it.

    Raises:
      ValueError: if a shape is not ints of at least 0.
    """
    found = {}
    for name, shape in shapes.items():
        sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"{argument}[{name!r}] must be the shape of one row, got {sizes!r}.")
        found[name] = sizes
    return found
