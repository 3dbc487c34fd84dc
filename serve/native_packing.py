"""Native code that packs requests: one call whatever the number of features, or of requests to be put together."""

import ctypes
from collections.abc import Sequence
from typing import Any

from jaxembed import extension
from jaxembed.inputs import RaggedTensor

from .buffers import Buffers
from .features import ServedFeature
from .rows import Rows

_NATIVE = extension.load("jaxembed_packing")
_PACK: Any = getattr(_NATIVE, "pack", None)
_MERGE: Any = getattr(_NATIVE, "merge", None)


def merge(parts: tuple[Rows, ...], buffers: Buffers) -> bool:
    """Writes the rows of all parts, one part after the other, to buffers that features share.

    Returns:
      False where the native code was not built, there is no room, or an array is of an unusual kind; the buffers
      are undefined then.
    """
    if _MERGE is None:
        return False
    return _MERGE(parts, buffers.ids, buffers.splits, buffers.weights, buffers.dense) >= 0


class NativePacker:
    """Packs requests of ragged ids on the host without weights; leaves others, and what is wrong, alone.

    Args:
      features: in the order of packing.
    """

    #: Whether the native code was built.
    available: bool = _PACK is not None

    def __init__(self, features: Sequence[ServedFeature]):
        count = len(features)
        self._limits = (
            (ctypes.c_uint32 * count)(*(f.max_ids for f in features)),
            (ctypes.c_uint32 * count)(*(f.config.table.vocabulary_size for f in features)),
        )
        self._addresses = tuple(map(ctypes.addressof, self._limits))

    def rows(self, leaves: Sequence[Any]) -> int | None:
        """The rows of a request that `write` may take, None for others."""
        first = leaves[0] if leaves and self.available else None
        return len(first.row_splits) - 1 if type(first) is RaggedTensor and len(first.row_splits) else None

    def write(self, leaves: list[Any], rows: int, buffers: Buffers) -> bool:
        """Writes a request; False if it is none of the usual ones or something is wrong with it.

        Args:
          leaves: of every feature.
          rows: of the first one; at most those of the buffers.
          buffers: to be written to; undefined where the request is not taken.
        """
        total = _PACK(
            leaves, RaggedTensor, *self._addresses, rows, buffers.batch, len(buffers.ids), *buffers.addresses
        )
        if total < 0:
            return False
        if buffers.weights is not None:
            buffers.weights[:total] = 1
        return True
