"""Arrays in mapped files, for libraries that want an array as a whole: they need no memory."""

import math
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import IO, Any

import numpy as np

from jaxembed.convert.interface import Stream

_ZEROS = bytes(1 << 20)


def new_mapped(file: pathlib.Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new array of zeros in a mapped file.

    Args:
      file: a new one.
      dtype: of the array.
      shape: of the array.

    Raises:
      OSError: if there is no room for it on the disk. Where a file has holes, the system finds that out when the map
        is written, and ends the process.
    """
    with file.open("xb+") as opened:
        return _map(opened, dtype, shape, file, "")


def temporary_mapped(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """As `new_mapped`, in a file that has no name and is gone with the array."""
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        return _map(file, dtype, shape, folder, " in a temporary file; set TMPDIR to a folder that has them")


def _map(file: IO[bytes], dtype: Any, shape: tuple[int, ...], where: Any, hint: str) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        else:
            for start in range(0, size, len(_ZEROS)):
                file.write(_ZEROS[: size - start])
            file.flush()
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror} for {size:,} bytes{hint}", str(where)) from e
    return np.memmap(file, dtype, "r+", shape=shape)


def mapped_rows(
    file: pathlib.Path, stream: Stream, blocks: Iterable[tuple[int, np.ndarray]], dtype: np.dtype | None = None
) -> np.ndarray:
    """The rows of a stream in a mapped file.

    Args:
      file: a new one.
      stream: whose shape and type they have.
      blocks: its rows, or what becomes of them.
      dtype: to see their bytes as, of the same size; None for that of the stream.

    Raises:
      OSError: if there is no room for them on the disk.
    """
    dtype = np.dtype(dtype or stream.dtype)
    mapped = new_mapped(file, dtype, stream.shape)
    for start, rows in blocks:
        mapped[start : start + rows.shape[0]] = rows.view(dtype)
    return mapped
