"""Buffers: the memory in which the requests of one rung lie, on the host and as the program takes it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxembed.memory import aligned_empty, shared

from .embedding import cpu_device
from .ladder import Rung
from .layout import Layout

_KEPT = 1 << 22  # bytes of dense inputs


class Buffers:
    """Used by one request at a time, and by the next one once the outputs of that one are there.

    Attributes:
      batch: B of the rung.
      ids: [N] int32.
      splits: [F, B + 1] int32.
      weights: [N] float32, or None.
      dense: [B, ...] float32 of every dense input.
      operands: ids, splits, weights and the dense inputs for the program: the same memory as arrays of the CPU
        device, which takes it to be a new value in every call. A host array would be made one of these in each.

    Args:
      layout: of the ids.
      rung: whose program takes them.
      dense_shapes: of one row of every dense input.
    """

    def __init__(self, layout: Layout, rung: Rung, dense_shapes: Iterable[tuple[int, ...]] = ()):
        self.batch: int = rung.batch
        self.ids: np.ndarray = aligned_empty((layout.size(rung),), np.int32)
        self.splits: np.ndarray = aligned_empty((len(layout.features), rung.batch + 1), np.int32)
        self.splits[...] = 0
        self.weights: np.ndarray | None = None
        if layout.weighted:
            self.weights = aligned_empty(self.ids.shape, np.float32)
        self.dense: list[np.ndarray] = [
            aligned_empty((rung.batch, *shape), np.float32) for shape in dense_shapes
        ]
        #: Large dense inputs are not: those of all rungs would add up.
        self.is_kept: bool = sum(array.nbytes for array in self.dense) <= _KEPT
        self.addresses: tuple[int, int] = (self.ids.ctypes.data, self.splits.ctypes.data)
        self.operands: tuple[Any, ...] = (
            *map(_operand, (self.ids, self.splits, self.weights)),
            list(map(_operand, self.dense)),
        )

    def write_dense(self, arrays: Sequence[np.ndarray], rows: int) -> None:
        """Writes the dense inputs of `rows` rows, and zeros behind them."""
        for target, array in zip(self.dense, arrays, strict=True):
            target[:rows] = array
            target[rows:] = 0


class Pool:
    """The buffers of all rungs that no request uses, but for those of large dense inputs."""

    def __init__(self, layout: Layout, rungs: Iterable[Rung], dense_shapes: Iterable[tuple[int, ...]]):
        self._layout, self._dense_shapes = layout, tuple(dense_shapes)
        self._spare: dict[Rung, list[Buffers]] = {rung: [] for rung in rungs}

    def take(self, rung: Rung) -> Buffers:
        """Buffers for one request; made where none is spare."""
        try:
            return self._spare[rung].pop()
        except IndexError:
            return Buffers(self._layout, rung, self._dense_shapes)

    def give(self, rung: Rung, buffers: Buffers) -> None:
        """Puts back what `take` gave, once nothing reads it any more."""
        if not buffers.is_kept:
            return
        self._spare[rung].append(buffers)


def _operand(array: np.ndarray | None) -> Any:
    on_device = None if array is None else shared(array, cpu_device())
    return array if on_device is None else on_device
