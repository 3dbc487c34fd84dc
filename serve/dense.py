"""The dense inputs of a model: floats of a fixed shape a row, by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.dense_shapes import dense_shapes
from jaxembed.inputs.ids import check_unmasked


class DenseInputs:
    """Reads and checks dense inputs.

    Args:
      shapes: by name, the shape of one row; an int K for [K].

    Raises:
      ValueError: if a shape is not ints of at least 0.
    """

    def __init__(self, shapes: Mapping[str, Any]):
        self.shapes: dict[str, tuple[int, ...]] = dense_shapes(shapes, "dense_inputs")

    def read(self, dense: Any, rows: int) -> list[np.ndarray]:
        """One [B, ...] array for every input, in the order of `shapes`.

        Raises:
          ValueError: naming the input, if it is missing, unknown, of another shape, or not finite numbers.
        """
        if not self.shapes and not dense:
            return []
        if not isinstance(dense, Mapping) or dense.keys() != self.shapes.keys():
            received = sorted(map(str, dense)) if isinstance(dense, Mapping) else type(dense).__name__
            raise ValueError(f"dense must be a dict with {list(self.shapes)}, got {received}.")
        return [_read(name, dense[name], (rows, *shape)) for name, shape in self.shapes.items()]


def _read(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    check_unmasked(f"dense input {name!r}", value)
    if isinstance(value, list | tuple):
        for at, row in enumerate(value):
            if isinstance(row, np.ma.MaskedArray):
                check_unmasked(f"dense input {name!r}, row {at},", row)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        raise ValueError(f"dense input {name!r} must be of shape {list(shape)}, got uneven rows.") from None
    if array.size == 0 and array.ndim == 1 and shape[0] == 0:
        array = array.reshape(shape)
    if array.dtype.kind not in "fiu" and array.dtype.name not in ("bfloat16", "float16"):
        raise ValueError(f"dense input {name!r} must hold numbers, got {array.dtype}.")
    if array.shape != shape:
        raise ValueError(
            f"dense input {name!r} must be of shape {list(shape)} (rows as in the features), got "
            f"{list(array.shape)}."
        )
    if array.dtype != np.float32:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        row, *position = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"dense input {name!r}, row {row}, position {position}: must be a finite float32, got "
            f"{np.asarray(value)[(row, *position)]}."
        )
    return array
