"""InferenceRequest: what every protocol's request is read into, whatever it was written in."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from jaxembed.serve.rows import Rows

from .errors import bad_request

ROW_SPLITS, WEIGHTS = ".row_splits", ".weights"
#: Bytes of a request from which on reading it would keep the event loop for long.
LARGE = 1 << 19


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """All features, one after the other.

    Attributes:
      ids: [N] int32 or int64, in the order of the signature.
      lengths: [F, B], of every bag; they add up to N.
    """

    ids: np.ndarray
    lengths: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class InferenceRequest:
    """A request as a ServedModel packs it.

    Attributes:
      inputs: by path of the feature; or Flat; or Rows, which the model's reader packed already.
      weights: by path of the feature, for some.
      dense: by name.
      outputs: the names that were asked for; None for all.
      id: to be sent back.
      timeout: seconds, or None.
    """

    inputs: dict[str, Any] | Flat | Rows
    weights: dict[str, Any]
    dense: dict[str, Any]
    outputs: tuple[str, ...] | None = None
    id: str | None = None
    timeout: float | None = None


def timeout_from(value: Any, per_second: float) -> float | None:
    """Seconds of a timeout that is given in units of 1 / `per_second` seconds; None for none.

    Raises:
      RequestError: if it is no positive number.
    """
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**53:
        raise bad_request(f"timeout must be a number above 0, got {str(value)[:80]!r}.")
    return value / per_second


def outputs_from(names: Iterable[Any]) -> tuple[str, ...]:
    """The names of the outputs that were asked for.

    Raises:
      RequestError: if one is no string, or there twice.
    """
    outputs = tuple(text_from(name, "the name of an output") for name in names)
    refuse_repeated("output", outputs)
    return outputs


def refuse_repeated(what: str, names: Collection[str]) -> None:
    """Refuses a name that is there twice; it takes time in proportion to their number.

    Raises:
      RequestError: if there is one.
    """
    if len(set(names)) != len(names):
        ((name, _),) = Counter(names).most_common(1)
        raise bad_request(f"{what} {name[:100]!r} is there twice.")


def text_from(value: Any, what: str) -> str:
    """`value`, which must be a string.

    Raises:
      RequestError: if it is none, or a long one, or half of a pair of surrogates, which cannot be sent back, is in it.
    """
    if not isinstance(value, str) or len(value) > 1000:
        raise bad_request(f"{what} must be a string of at most 1000 characters, got {str(value)[:80]!r}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad_request(f"{what} must have no surrogate without its pair, got {value[:80]!r}.") from None
    return value
