"""NativePacker: the usual requests, checked and packed in one native call whatever the number of features."""

import ctypes
import operator
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.inputs import RaggedTensor

from .buffers import Buffers
from .features import ServedFeature
from .native_library import library

_IS_WIDE = {frozenset([np.dtype(np.int32)]): False, frozenset([np.dtype(np.int64)]): True}
_DTYPE = operator.attrgetter("dtype")


class NativePacker:
    """Packs requests of ragged ids on the host without weights; leaves others, and what is wrong, alone.

    Args:
      features: in the order of packing.
    """

    def __init__(self, features: Sequence[ServedFeature]):
        native = library()
        self._pack: Any = native and native.JaxembedPack
        count = len(features)
        self._sizes = struct.Struct(f"{count}q").pack
        self._max_ids = (ctypes.c_uint32 * count)(*(f.max_ids for f in features))
        self._vocabularies = (ctypes.c_uint32 * count)(*(f.config.table.vocabulary_size for f in features))

    def rows(self, leaves: Sequence[Any]) -> int | None:
        """The rows of a request that `write` may take, None for others."""
        if self._pack is None or set(map(type, leaves)) != {RaggedTensor}:
            return None
        return len(leaves[0].row_splits) - 1 if len(leaves[0].row_splits) else None

    def write(self, leaves: Sequence[Any], rows: int, buffers: Buffers) -> bool:
        """Writes a request; False if it is none of the usual ones or something is wrong with it.

        Args:
          leaves: a RaggedTensor for every feature.
          rows: of the first one; at most those of the buffers.
          buffers: to be written to; undefined where the request is not taken.
        """
        ids, splits = [leaf.values for leaf in leaves], [leaf.row_splits for leaf in leaves]
        if {*map(type, ids), *map(type, splits)} != {np.ndarray} or set(map(len, splits)) != {rows + 1}:
            return False
        wide = _IS_WIDE.get(frozenset(map(_DTYPE, ids)))
        wide_splits = _IS_WIDE.get(frozenset(map(_DTYPE, splits)))
        sizes = list(map(len, ids))
        total = sum(sizes)
        if wide is None or wide_splits is None or total > len(buffers.ids):
            return False
        try:  # the fastest way to put arrays end to end
            flat, ends = b"".join(ids), b"".join(splits)
        except TypeError:  # not contiguous
            return False
        # More values than rows, where the arrays are not of rank 1: transformations make such tensors unchecked.
        if len(flat) != total * (8 if wide else 4) or len(ends) != len(ids) * (rows + 1) * (
            8 if wide_splits else 4
        ):
            return False
        packed = self._pack(
            flat,
            wide,
            ends,
            wide_splits,
            self._sizes(*sizes),
            self._max_ids,
            self._vocabularies,
            len(sizes),
            rows,
            buffers.batch,
            *buffers.addresses,
        )
        if packed and buffers.weights is not None:
            buffers.weights[:total] = 1
        return bool(packed)
