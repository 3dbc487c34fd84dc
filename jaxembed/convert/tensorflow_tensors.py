"""The tensors of a TensorFlow checkpoint, by rows."""

import pathlib
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import stored
from jaxembed.convert.tensor_bundle import TensorBundle


class Tensors:
    """The tensors of a checkpoint, by rows.

    Args:
      prefix: of the checkpoint.

    Raises:
      ValueError: if there is none, or it is damaged.
    """

    def __init__(self, prefix: pathlib.Path):
        self.prefix = prefix
        self._tf: Any = needed("tensorflow", "tensorflow")
        try:
            self._reader = self._tf.train.load_checkpoint(str(prefix))
            self.shapes: dict[str, list[int]] = dict(sorted(self._reader.get_variable_to_shape_map().items()))
            self._dtypes = self._reader.get_variable_to_dtype_map()
        except (self._tf.errors.OpError, ValueError, RuntimeError, TypeError, LookupError) as e:
            raise CheckpointError(f"{prefix} is no TensorFlow checkpoint, or is damaged: {str(e)[:300]}") from e
        self._bundle = TensorBundle(prefix)

    def is_number(self, key: str) -> bool:
        """Whether it is of floats or integers."""
        return self._dtypes[key].is_floating or self._dtypes[key].is_integer

    def stored(self, key: str) -> StoredArray:
        """A tensor of numbers, mapped and verified when the first of its rows is asked for."""
        shape, dtype = tuple(self.shapes[key]), np.dtype(self._dtypes[key].as_numpy_dtype)
        rows = self._bundle.rows(key, shape, dtype)
        return stored(
            f"{self.prefix}: {key}",
            shape,
            dtype,
            rows or (lambda start, stop: self._read(key, shape, start, stop)),
        )

    def _read(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Rows of a tensor in another byte order; TensorFlow reads the whole of it, or the pieces that they are in."""
        part = slice_spec(shape, start, stop - start)
        try:
            with self._tf.device("/cpu:0"):
                return self._tf.raw_ops.RestoreV2(
                    prefix=str(self.prefix),
                    tensor_names=[key],
                    shape_and_slices=[part],
                    dtypes=[self._dtypes[key]],
                )[0].numpy()
        except (self._tf.errors.OpError, ValueError, RuntimeError) as e:
            raise CheckpointError(f"{self.prefix}: {key} cannot be read, or is damaged: {str(e)[:300]}") from e

    def string(self, key: str) -> bytes:
        """The value of a string tensor."""
        try:
            value = self._reader.get_tensor(key)
        except Exception as e:  # TensorFlow raises many types
            raise CheckpointError(f"{self.prefix}: {key} is damaged: {str(e)[:200]}") from e
        if not isinstance(value, bytes):
            raise CheckpointError(f"{self.prefix}: {key} is damaged: it is no string.")
        return value


def slice_spec(shape: tuple[int, ...], start: int, count: int) -> str:
    """A part as TensorFlow writes it: the whole shape, then first and length of each axis, "-" for all."""
    if count == shape[0]:
        return ""
    return f"{' '.join(map(str, shape))} {':'.join([f'{start},{count}', *['-'] * (len(shape) - 1)])}"
