"""Deltas: the rows of a table that differ from an earlier version of the bundle."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.safetensors_file import header_of
from jaxembed.checkpoint.stored import StoredArray, aligned_empty

IDS, ROWS = "ids", "rows"
#: Above this share of changed rows a table is written whole: it can then be mapped.
MAX_SHARE = 0.5


def changed_rows(array: StoredArray, base: StoredArray | None) -> np.ndarray | None:
    """The rows of `array` whose bytes differ from those of `base`, in order; None to write it whole."""
    if base is None or (base.shape, base.form) != (array.shape, array.form):
        return None
    found = []
    for start, rows in array.blocks():
        others = base.read_rows(start, start + rows.shape[0])
        found.append(start + np.flatnonzero((rows.view(np.uint8) != others.view(np.uint8)).any(axis=1)))
    ids = np.concatenate(found).astype(np.int64)
    return None if ids.size > MAX_SHARE * array.shape[0] else ids


def delta_bytes(array: StoredArray, ids: np.ndarray) -> int:
    """Of such a file; 0 without rows, for then there is none."""
    row_bytes = array.num_bytes // array.shape[0]
    return len(_header(array, ids)) + ids.nbytes + ids.size * row_bytes if ids.size else 0


def delta_parts(array: StoredArray, ids: np.ndarray) -> Iterator[Any]:
    """The bytes of a file that holds these rows of a table."""
    yield _header(array, ids)
    yield ids.tobytes()
    for start, rows in array.blocks():
        low, high = np.searchsorted(ids, [start, start + rows.shape[0]])
        if low < high:
            yield rows[ids[low:high] - start].tobytes()


def _header(array: StoredArray, ids: np.ndarray) -> bytes:
    return header_of({IDS: (ids.dtype, ids.shape), ROWS: (array.dtype, (ids.size, *array.shape[1:]))})


def apply_delta(file: pathlib.Path, base: np.ndarray, delta: Mapping[str, np.ndarray]) -> np.ndarray:
    """A copy of `base` with the rows of a delta in it.

    Raises:
      CheckpointError: if the delta is not one of this table.
    """
    ids, rows = delta.get(IDS), delta.get(ROWS)
    if ids is None or rows is None or ids.dtype != np.int64 or ids.ndim != 1:
        raise CheckpointError(f"{file} is no delta of a table: it must hold int64 'ids' and 'rows'.")
    if (rows.shape, rows.dtype) != ((ids.size, *base.shape[1:]), base.dtype):
        raise CheckpointError(
            f"{file} must hold {base.dtype.name}{[ids.size, *base.shape[1:]]} rows, got {rows.dtype.name}{list(rows.shape)}."
        )
    if ids.size and (ids[0] < 0 or ids[-1] >= base.shape[0] or (np.diff(ids) <= 0).any()):
        raise CheckpointError(f"{file} is damaged: its ids are not rows of the table in order.")
    out = aligned_empty(base.shape, base.dtype)
    out[...] = base
    out[ids] = rows
    out.flags.writeable = False
    return out
