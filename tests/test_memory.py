"""Memory that CPU devices use in place."""

import jax
import numpy as np
import pytest

from jaxembed.memory import ALIGNMENT, aligned, aligned_empty


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1000, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_starts_where_jax_reads_in_place(shape, dtype):
    array = aligned_empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert not array.size or array.ctypes.data % ALIGNMENT == 0


def test_only_what_is_not_aligned_is_copied():
    array = aligned_empty((64, 16), np.float32)
    array[...] = np.arange(1024).reshape(64, 16)
    assert aligned(array) is array
    assert jax.device_put(array, jax.devices("cpu")[0]).unsafe_buffer_pointer() == array.ctypes.data
    for other in (array.reshape(-1)[1:], array[:, ::2]):
        copy = aligned(other)
        assert copy.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(copy, other)
