"""The dense inputs of a model: floats of a fixed shape a row, by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.dense_shapes import dense_shapes
from jaxembed.inputs.ids import check_unmasked

from .arrays import own


class DenseInputs:
    """Reads and checks dense inputs.

    Args:
      shapes: by name, the shape of one row; an int K for [K].

    Raises:
      ValueError: if a shape is not ints of at least 0.
    """

    def __init__(self, shapes: Mapping[str, Any]):
        self.shapes: dict[str, tuple[int, ...]] = dense_shapes(shapes, "dense_inputs")

    def read(self, dense: Any, rows: int, *, keep: bool = False) -> list[np.ndarray]:
        """One [B, ...] array for every input, in the order of `shapes`.

        Args:
          dense: arrays or lists, by name.
          rows: B.
          keep: whether the arrays are used later, when whoever passed them may have written to them.

        Raises:
          ValueError: naming the input, if it is missing, unknown, of another shape, or not finite numbers.
        """
        if not self.shapes and not dense:
            return []
        if not isinstance(dense, Mapping) or dense.keys() != self.shapes.keys():
            received = sorted(map(str, dense)) if isinstance(dense, Mapping) else type(dense).__name__
            raise ValueError(f"dense must be a dict with {list(self.shapes)}, got {received}.")
        return [_read(name, dense[name], (rows, *shape), keep) for name, shape in self.shapes.items()]


def _read(name: str, value: Any, shape: tuple[int, ...], keep: bool) -> np.ndarray:
    check_unmasked(f"dense input {name!r}", value)
    listed = isinstance(value, list | tuple)
    if listed:
        for at, row in enumerate(value):
            if isinstance(row, np.ma.MaskedArray):
                check_unmasked(f"dense input {name!r}, row {at},", row)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        raise ValueError(f"dense input {name!r} must be of shape {list(shape)}, got uneven rows.") from None
    if listed and array.dtype.kind in "Ob":  # ints beyond 64 bits, or what is no number
        array = _numbers(name, array)
    if array.size == 0 and array.ndim == 1 and shape[0] == 0:
        array = array.reshape(shape)
    if array.dtype.kind not in "fiu" and array.dtype.name not in ("bfloat16", "float16"):
        raise ValueError(f"dense input {name!r} must hold numbers, got {array.dtype}.")
    if array.shape != shape:
        raise ValueError(
            f"dense input {name!r} must be of shape {list(shape)} (rows as in the features), got "
            f"{list(array.shape)}."
        )
    if array.dtype == np.float32:
        array = own(array) if keep and not listed else array
    else:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        row, *position = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"dense input {name!r}, row {row}, position {position}: must be a finite float32, got "
            f"{_shown(np.asarray(value)[(row, *position)])}."
        )
    return array


def _shown(value: Any) -> str:
    try:
        return f"{value!s:.80}"
    except ValueError:  # Python writes no int of thousands of digits
        return "an int that is far beyond it"


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    """The numbers of a list as float64; what is beyond it is infinite."""
    numbers = np.empty(array.size)
    for at, value in enumerate(array.ravel().tolist()):
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            row, *position = (int(i) for i in np.unravel_index(at, array.shape))
            raise ValueError(
                f"dense input {name!r}, row {row}, position {position}: must hold numbers, got {value!r:.80}."
            )
        try:
            numbers[at] = value
        except OverflowError:
            numbers[at] = np.inf
    return numbers.reshape(array.shape)
