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
      ValueError: if it is one id, and neither an array nor a sequence.
    """
    ids = _host_array(ids)
    _check_sequence(ids)
    if isinstance(ids, np.ndarray) and (ids.dtype.kind in "iu" or not ids.size):
        return ids.astype(np.int64) if ids.dtype.kind != "u" or ids.dtype.itemsize < 8 else _signed(ids)
    for at, value in enumerate(ids):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise _bad_type(at, "an int64", value, "dtype='string' takes strings")
        if not -(2**63) <= value < 2**63:
            raise BadIdError(at, f"the id must be an int64, got {value!r:.80}.")
    return np.array(ids, np.int64)


def checked_strings(ids: Any) -> list[str | bytes]:
    """[N] strings, as they are.

    Raises:
      BadIdError: for the first that is neither str nor bytes, or a str that UTF-8 cannot write.
      ValueError: if it is neither an array of rank 1 nor a sequence.
    """
    ids = _host_array(ids)
    _check_sequence(ids)
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind not in "USOT" and ids.size:
            raise _bad_type(0, "a string", ids.flat[0], "dtype='int64' takes integers")
        ids = ids.tolist()
    for at, value in enumerate(ids):
        if not isinstance(value, str | bytes):
            raise _bad_type(at, "a string", value, "dtype='int64' takes integers")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadIdError(
                    at, f"the id must be a string of whole characters, got {value!r:.80}."
                ) from None
    return list(ids)


def _host_array(ids: Any) -> Any:
    """A numpy array of an array, whoever made it; others as they are."""
    return np.asarray(ids) if hasattr(ids, "dtype") else ids


def _check_sequence(ids: Any) -> None:
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0:
        raise ValueError(f"rows() takes a sequence or array of [N] ids, got {ids!r:.80}; put one id in a list.")


def _bad_type(at: int, wanted: str, value: Any, hint: str) -> BadIdError:
    if isinstance(value, list | tuple | np.ndarray):
        hint = "pass bags as a list of lists, as the tolist() of an array of lists gives it"
    return BadIdError(at, f"the id must be {wanted}, got {value!r:.80}; {hint}.")


def _signed(ids: np.ndarray) -> np.ndarray:
    large = np.flatnonzero(ids >= np.uint64(2**63))
    if large.size:
        raise BadIdError(int(large[0]), f"the id must be an int64, got {ids.flat[large[0]]}.")
    return ids.astype(np.int64)
