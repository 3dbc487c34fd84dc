"""Types of values: what becomes of bytes of another order, and which types a format cannot hold."""

import pathlib
from collections.abc import Iterable

import numpy as np

from jaxembed.convert.interface import Contents, Stream


def native(dtype: np.dtype) -> np.dtype:
    """The same type in this machine's byte order."""
    return dtype.newbyteorder("=")


def bits(dtype: np.dtype) -> np.dtype:
    """What values are mapped and lent as: themselves, or where numpy does not know them ints of their size."""
    return np.dtype(np.int16) if dtype.name == "bfloat16" else dtype


def refuse_types(contents: Contents, form: str, names: tuple[str, ...]) -> None:
    """Raises ValueError if an array is of one of the types `names`, which `form` cannot hold."""
    for stream in contents.streams:
        if stream.dtype.name in names:
            raise ValueError(
                f"{form} cannot hold {stream.dtype.name}, the type of table {stream.table!r}; convert it with "
                "--dtype float32, or to safetensors."
            )


def mapped_rows(
    file: pathlib.Path, stream: Stream, blocks: Iterable[tuple[int, np.ndarray]], dtype: np.dtype | None = None
) -> np.ndarray:
    """The rows of a stream in a mapped file, for libraries that want an array as a whole: it needs no memory.

    Args:
      file: a new one.
      stream: whose shape and type they have.
      blocks: its rows, or what becomes of them.
      dtype: to see their bytes as, of the same size; None for that of the stream.
    """
    dtype = np.dtype(dtype or stream.dtype)
    mapped = np.memmap(file, dtype, "w+", shape=stream.shape)
    for start, rows in blocks:
        mapped[start : start + rows.shape[0]] = rows.view(dtype)
    return mapped
