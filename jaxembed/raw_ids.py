"""What may be a raw id: an int64 or a string, and nothing that would have to be rounded or converted."""

from typing import Any

import numpy as np


class BadIdError(ValueError):
    """An id that no row answers to, with its position among those that were passed."""

    def __init__(self, at: int, message: str):
        super().__init__(message)
        self.at = at


def checked_integers(ids: Any) -> np.ndarray:
    """Integers as int64: an array of them in its shape, or [N] of a sequence.

    Raises:
      BadIdError: for the first that is no integer, or beyond int64.
    """
    if hasattr(ids, "dtype"):
        ids = np.asarray(ids)
    if isinstance(ids, np.ndarray) and (ids.dtype.kind in "iu" or not ids.size):
        return ids.astype(np.int64) if ids.dtype.kind != "u" or ids.dtype.itemsize < 8 else _signed(ids)
    for at, value in enumerate(ids):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise BadIdError(at, f"the id must be an int64, got {value!r:.80}; dtype='string' takes strings.")
        if not -(2**63) <= value < 2**63:
            raise BadIdError(at, f"the id must be an int64, got {value!r:.80}.")
    return np.array(ids, np.int64)


def checked_strings(ids: Any) -> list[str | bytes]:
    """[N] strings, as they are.

    Raises:
      BadIdError: for the first that is neither str nor bytes, or a str that UTF-8 cannot write.
    """
    if hasattr(ids, "dtype"):
        ids = np.asarray(ids)
        if ids.dtype.kind not in "USOT" and ids.size:
            raise BadIdError(0, f"the id must be a string, got {ids[0]!r:.80}; dtype='int64' takes integers.")
        ids = ids.tolist()
    for at, value in enumerate(ids):
        if not isinstance(value, str | bytes):
            raise BadIdError(at, f"the id must be a string, got {value!r:.80}; dtype='int64' takes integers.")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadIdError(
                    at, f"the id must be a string of whole characters, got {value!r:.80}."
                ) from None
    return list(ids)


def _signed(ids: np.ndarray) -> np.ndarray:
    large = np.flatnonzero(ids >= np.uint64(2**63))
    if large.size:
        raise BadIdError(int(large[0]), f"the id must be an int64, got {ids[large[0]]}.")
    return ids.astype(np.int64)
