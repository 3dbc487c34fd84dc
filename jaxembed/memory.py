"""Memory for tables, as CPU devices and the processor's address translation like it."""

from collections.abc import Iterable
from typing import Any

import jax
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


def unshared(array: Any, others: Iterable[Any]) -> Any:
    """`array`, or its copy if it is a host array in memory that one of `others` has, too."""
    if not isinstance(array, np.ndarray):
        return array
    if not any(isinstance(other, np.ndarray) and np.may_share_memory(array, other) for other in others):
        return array
    if array.nbytes < 2**18:  # which XLA copies once more in less time than aligned memory is found
        return array.copy()
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def shared(array: np.ndarray, device: Any) -> jax.Array | None:
    """`array` as an array of a CPU device, in the same memory, which XLA keeps while a program uses it.

    Returns:
      None where the device would not take the memory as it is.
    """
    with jax.ensure_compile_time_eval():  # not a part of a program that is being traced
        on_device = jax.device_put(array, device)
        return on_device if on_device.unsafe_buffer_pointer() == array.ctypes.data else None
