"""Arrays that are saved in pieces: whether these are all of one, and its rows out of them."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError

#: First row, column and so on of a piece, and how many of each it has.
Extent = tuple[tuple[int, ...], tuple[int, ...]]


class Pieces:
    """An array [R, ...] in pieces.

    Args:
      what: how errors name it.
      shape: of the whole.
      dtype: of the values.
      extents: of the pieces.
      open_piece: called with the number of a piece when the first of its rows is asked for, once; returns its values.

    Raises:
      CheckpointError: unless every value of the array is in exactly one piece.
    """

    def __init__(
        self,
        what: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        extents: Sequence[Extent],
        open_piece: Callable[[int], np.ndarray],
    ):
        _check_cover(what, shape, extents)
        self._shape, self._dtype, self._extents, self._open = shape, dtype, extents, open_piece
        self._first = np.array([offsets[0] if shape else 0 for offsets, _ in extents], np.int64)
        self._count = np.array([sizes[0] if shape else 1 for _, sizes in extents], np.int64)
        self._views: dict[int, np.ndarray] = {}

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows [start, stop)."""
        out = np.empty((stop - start, *self._shape[1:]), self._dtype)
        is_in = (self._first < stop) & (start < self._first + self._count) & (self._count > 0)
        for i in np.flatnonzero(is_in).tolist():
            (first, *offsets), (count, *sizes) = self._extents[i]
            if i not in self._views:
                self._views[i] = self._open(i)
            low, high = max(start, first), min(stop, first + count)
            columns = (slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            out[(slice(low - start, high - start), *columns)] = self._views[i][low - first : high - first]
        return out


def _check_cover(what: str, shape: tuple[int, ...], extents: Sequence[Extent]) -> None:
    low = np.array([offsets for offsets, _ in extents], object).reshape(len(extents), -1)
    high = low + np.array([sizes for _, sizes in extents], object).reshape(low.shape)
    inside = low.shape[1] == len(shape) and all(
        ((low >= 0) & (low <= high) & (high <= np.array(shape, object))).flat
    )
    if not inside or sum(math.prod(sizes) for _, sizes in extents) != math.prod(shape):
        raise CheckpointError(f"{what} is damaged: its pieces are not all of it.")
    filled = [i for i, (_, sizes) in enumerate(extents) if math.prod(sizes)]
    low, high = low[filled].astype(np.int64), high[filled].astype(np.int64)
    for i in range(len(filled) if shape else 0):
        # As the sum is right, they cover all of it if no two share a value.
        if np.all((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i]), axis=1).any():
            raise CheckpointError(f"{what} is damaged: two of its pieces overlap.")
