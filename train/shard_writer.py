"""Writes one shard of an array onto its device by runs of rows, so that the host holds a window of it only."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax


class ShardWriter:
    """Collects rows in a window on the host, and puts full windows into the device's memory in place.

    Args:
      shape: of the shard, [R, ...].
      dtype: of the shard.
      device: the `jax.Device` that holds it.
      initial: what it is before rows are written; it is donated. None for zeros.
      window_bytes: of the host's window.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        device: Any,
        initial: jax.Array | None,
        window_bytes: int,
    ):
        self._shape, self._dtype, self._device, self._data = shape, np.dtype(dtype), device, initial
        row_bytes = max(int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize, 1)
        self._window_rows = min(max(window_bytes // row_bytes, 1), max(shape[0], 1))
        self._window: np.ndarray | None = None
        self._start = 0

    def write(self, row: int, rows: np.ndarray) -> None:
        """Puts `rows` [N, ...] at row `row` of the shard and after.

        Rows of another width than the shard's are those of a shard that holds them one after the other in
        lines of its own width.
        """
        if rows.shape[1:] != self._shape[1:]:
            self._write_lines(row * rows.shape[1], rows.reshape(-1))
            return
        done = 0
        while done < rows.shape[0]:
            window = self._open_window(row + done)
            at = row + done - self._start
            count = min(rows.shape[0] - done, window.shape[0] - at)
            window[at : at + count] = rows[done : done + count]
            done += count

    def _write_lines(self, place: int, values: np.ndarray) -> None:
        width, done = self._shape[1], 0
        while done < values.size:
            window = self._open_window((place + done) // width).reshape(-1)
            at = place + done - self._start * width
            count = min(values.size - done, window.size - at)
            window[at : at + count] = values[done : done + count]
            done += count

    def finish(self) -> jax.Array:
        """The shard, on its device."""
        self._flush()
        if self._data is None:
            self._data = self._zeros()
        return self._data

    def _open_window(self, row: int) -> np.ndarray:
        if self._window is None or not 0 <= row - self._start < self._window.shape[0]:
            self._flush()
            self._start = row - row % self._window_rows
            stop = min(self._start + self._window_rows, self._shape[0])
            # Rows that nobody writes stay what they are on the device.
            self._window = (
                np.zeros((stop - self._start, *self._shape[1:]), self._dtype)
                if self._data is None
                else np.array(self._data[self._start : stop])
            )
        return self._window

    def _flush(self) -> None:
        if self._window is None:
            return
        window, self._window = jax.device_put(self._window, self._device), None
        if window.shape == self._shape:
            self._data = window
            return
        self._data = _update(self._zeros() if self._data is None else self._data, window, self._start)
        # One window at a time, however slow the device.
        self._data.block_until_ready()

    def _zeros(self) -> jax.Array:
        return jax.numpy.zeros(self._shape, self._dtype, device=self._device)


@partial(jax.jit, donate_argnums=0)
def _update(data: jax.Array, window: jax.Array, start: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(data, window, start, 0)
