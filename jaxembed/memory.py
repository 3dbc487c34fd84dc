"""Memory for tables, as CPU devices and the processor's address translation like it."""

from typing import Any

import numpy as np

#: XLA reads host arrays in place from such addresses on, and copies others.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialized memory that CPU devices can use in place; on huge pages, where the system has them.

    numpy asks Linux for huge pages from 4 MiB on. Lookups of random rows are up to twice as fast there: with
    pages of 4 KiB, most rows need an address translation that the processor does not hold.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself where CPU devices can use it in place, else a copy that they can."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
