"""Arrays of a checkpoint on disk, read by rows, so that no more than is needed is in memory."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError, Digests, block_rows, num_rows
from jaxembed.memory import aligned_empty

READ_AHEAD = 3
BLOCK_BYTES, CACHE_BYTES = 4 << 20, 16 << 20


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint; nothing is read until asked.

    Attributes:
      what: how errors name it.
      source: a tensorstore, a numpy array, or anything with a shape and a dtype whose slices are numpy arrays.
      digests: what it must be, or None to take it as it is.
    """

    what: str
    source: Any
    digests: Digests | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return tuple(self.source.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        dtype = self.source.dtype
        return np.dtype(getattr(dtype, "numpy_dtype", dtype))

    @property
    def form(self) -> str:
        """What is on disk."""
        return self.dtype.name

    @property
    def num_bytes(self) -> int:
        """On disk, uncompressed."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def blocks(
        self, max_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) from the first to the last, checked; at most a few of `max_bytes` at a time.

        Args:
          max_bytes: of a block, unless one digest is of more.
          start: blocks of rows before it are left out.
          stop: blocks of rows from it on, too; default: none.

        Raises:
          CheckpointError: if the rows cannot be read, or are not those that were saved.
        """
        stop = num_rows(self.shape) if stop is None else stop
        pending: collections.deque[tuple[int, Any]] = collections.deque()
        for first, last in self._spans(start, stop, max_bytes):
            pending.append((first, self._start(first, last)))
            if len(pending) > READ_AHEAD:
                yield self._finish(*pending.popleft())
        while pending:
            yield self._finish(*pending.popleft())

    def read(self) -> np.ndarray:
        """All of it, in memory that starts on a 64-byte boundary, so that CPU devices can use it in place.

        Raises:
          CheckpointError: as `blocks`.
        """
        out = aligned_empty(self.shape, self.dtype)
        if not out.ndim:
            out[...] = self._finish(0, self._start(0, 1))[1]
            return out
        for start, rows in self.blocks():
            out[start : start + rows.shape[0]] = rows
        return out

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows [start, stop), checked along with the rest of their blocks.

        Raises:
          CheckpointError: as `blocks`.
        """
        out = aligned_empty((stop - start, *self.shape[1:]), self.dtype)
        for first, last in self._spans(start, stop) if stop > start else []:
            _, rows = self._finish(first, self._start(first, last))
            a, b = max(first, start), min(last, stop)
            out[a - start : b - start] = rows[a - first : b - first]
        return out

    def _spans(self, start: int, stop: int, max_bytes: int = 16 << 20) -> list[tuple[int, int]]:
        digests = self.digests or _undigested(self.shape, self.dtype, start, stop)
        return digests.spans(max_bytes, start, stop)

    def _start(self, start: int, stop: int) -> Any:
        part = self.source[start:stop] if self.shape else self.source
        return part if isinstance(part, np.ndarray) else part.read()

    def _finish(self, start: int, pending: Any) -> tuple[int, np.ndarray]:
        try:
            rows = pending if isinstance(pending, np.ndarray) else np.asarray(pending.result())
        except Exception as e:  # tensorstore raises many types
            raise CheckpointError(f"{self.what} cannot be read: {str(e)[:300]}; restore another step.") from e
        if self.digests is not None:
            self.digests.check(rows, self.what, start)
        return start, rows


@dataclasses.dataclass(frozen=True)
class WatchedArray(StoredArray):
    """An array that says how far the reading of its blocks is.

    Attributes:
      advance: called with the number of bytes of each block, once it is dealt with.
    """

    advance: Callable[[int], Any] = lambda num_bytes: None

    def blocks(
        self, max_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As those of a StoredArray."""
        for first, rows in super().blocks(max_bytes, start, stop):
            yield first, rows
            self.advance(rows.nbytes)


def open_array(
    part: pathlib.Path, key: str, what: str, digests: Digests | None = None, cache: Any = None
) -> StoredArray:
    """The array that Orbax stored as `key` in a part of a checkpoint.

    Raises:
      CheckpointError: if there is none, or it is not of the shape and type of `digests`.
    """
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{part}/"}, "path": f"{key}/"},
    }
    try:
        source = tensorstore.open(spec, open=True, read=True, context=cache or shared_cache()).result()
    except Exception as e:  # tensorstore raises many types
        raise CheckpointError(f"{what} cannot be opened: {str(e)[:300]}; restore another step.") from e
    array = StoredArray(what, source, digests)
    if digests is not None and (array.shape, array.dtype.name) != (digests.shape, digests.dtype):
        raise CheckpointError(
            f"{what} is damaged: saved as {digests.dtype}{list(digests.shape)}, on disk it is "
            f"{array.dtype.name}{list(array.shape)}; restore another step."
        )
    return array


def shared_cache() -> Any:
    """A cache for the arrays of one opened checkpoint: room for chunks that two blocks of rows share.

    Never one for the whole process: it would hide what has become of the files since.
    """
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _undigested(shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int) -> Digests:
    """The blocks that hold the rows [start, stop), without digests."""
    step = block_rows(shape, dtype)
    first, last = start // step * step, min(-(-stop // step) * step, num_rows(shape))
    return Digests(shape, dtype.name, (*range(first, last, step), last), ())
