"""NativeReader: the usual requests, read and packed by native code."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.serve.native_library import library
from jaxembed.serve.packing import Packed
from jaxembed.serve.rows import Rows

from .errors import too_many_rows
from .request import ROW_SPLITS
from .signature import Signature

_SIZES = 3 + 2 * 64  # rows, ids, number of spans, spans
_SMALL = 1 << 18  # bytes
_SHORT = 1 << 14  # bytes that are read without letting another thread run meanwhile: some tens of microseconds
_ROOM = 1 << 13  # numbers of a request that is read and written in one call
_WRITTEN = 2
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


def make_reader(signature: Signature) -> "NativeReader | None":
    """The reader of a model's requests; None where they are read in Python."""
    native, holding = library(), library(holding=True)
    if native is None or holding is None or not signature.takes_flat or not signature.features:
        return None
    return NativeReader(native, holding, signature)


class NativeReader:
    """Reads, checks and packs requests of all features and dense inputs, in one of the three encodings of v2.

    It reads what clients usually send, and leaves everything else alone: weights, other types than INT64, INT32
    and FP32, escapes in names, and whatever is wrong, about which the readers in Python have more to say.

    Args:
      native: the library.
      holding: the same, whose functions hold the interpreter.
      signature: of the model, with `takes_flat` and at least one feature.
    """

    def __init__(self, native: ctypes.CDLL, holding: ctypes.CDLL, signature: Signature):
        self._native, self._signature = native, signature
        self._weighted = any(feature.weighted for feature in signature.features.values())
        self._take, self._fill = native.JaxembedReaderTake, native.JaxembedReaderFill
        self._take_short = holding.JaxembedReaderTake
        self._num_features = len(signature.features)
        self._dense = [(shape, math.prod(shape)) for shape in signature.dense.values()]
        self._row_words = self._num_features + sum(size for _, size in self._dense)  # beside the ids
        self._spare: list[_Handle] = []

    def json(self, body: bytes, json_size: int) -> tuple[Rows, bytes] | None:
        """Rows of a request in JSON, and the JSON object that its other members make up; None leaves it alone.

        Args:
          body: of the request.
          json_size: bytes of it that are JSON; tensors in binary follow.

        Raises:
          RequestError: if it has too many rows.
        """
        found = self._rows(body, json_size)
        if found is None:
            return None
        return found[0], b"{%b}" % b",".join(found[1])

    def message(self, body: bytes) -> tuple[Rows, bytes] | None:
        """Rows of a ModelInferRequest, and the message that its other fields make up; None leaves it alone.

        Raises:
          RequestError: if it has too many rows.
        """
        found = self._rows(body, -1)
        if found is None:
            return None
        return found[0], b"".join(found[1])

    def _rows(self, body: bytes, json_size: int) -> tuple[Rows, list[bytes]] | None:
        """Rows, and the pieces of the body that are no tensor."""
        try:
            handle = self._spare.pop()
        except IndexError:
            handle = _Handle(self._native, self._signature)
        size, written = len(body), False
        take = self._take_short if size < _SHORT else self._take
        try:
            state = take(handle.pointer, body, json_size, size)
            if not state:
                return None
            num_rows, total, num_spans = handle.sizes[:3]
            words = total + num_rows * self._row_words + self._num_features
            if state == _WRITTEN:
                out = handle.out[:words].copy()
            elif num_rows > self._signature.max_rows:
                raise too_many_rows(num_rows, self._signature.max_rows)
            else:
                out = np.empty(words, _INT32)
                if not self._fill(handle.pointer, out.ctypes.data):
                    return None
            ends = iter(handle.sizes[3 : 3 + 2 * num_spans])
            written = True
        finally:
            # One that was left early holds what it parsed.
            if written or size < _SMALL:
                self._spare.append(handle)
        weights = np.ones(total, _FLOAT32) if self._weighted else None
        splits = np.ndarray((self._num_features, num_rows + 1), _INT32, out, 4 * total)
        at = 4 * (total + splits.size)
        dense = []
        for shape, row_size in self._dense:
            dense.append(np.ndarray((num_rows, *shape), _FLOAT32, out, at))
            at += 4 * num_rows * row_size
        rows = Rows(Packed(num_rows, out[:total], splits, weights), dense)
        return rows, [body[start:end] for start, end in zip(ends, ends, strict=True)]


class _Handle:
    """What one request at a time is read with.

    Attributes:
      pointer: of the native reader.
      sizes: rows, ids, number of spans and spans of the request that was read last.
      out: its ids, splits and dense inputs, where it is small.
    """

    def __init__(self, native: ctypes.CDLL, signature: Signature):
        features, shapes = signature.features, list(signature.dense.values())
        names = [name.encode() for path in features for name in (path, path + ROW_SPLITS)]
        names += [name.encode() for name in signature.dense]
        self.sizes = (ctypes.c_int64 * _SIZES)()
        self.out = np.empty(_ROOM, _INT32)
        pointer = native.JaxembedReaderMake(
            ctypes.c_int64(len(features)),
            ctypes.c_int64(len(shapes)),
            (ctypes.c_char_p * len(names))(*names),
            _array(ctypes.c_uint32, [f.config.table.vocabulary_size for f in features.values()]),
            _array(ctypes.c_int32, [f.max_ids for f in features.values()]),
            _array(ctypes.c_int64, [len(shape) for shape in shapes]),
            _array(ctypes.c_int64, [size for shape in shapes for size in shape]),
            ctypes.c_int64(signature.max_rows),
            self.sizes,
            ctypes.c_void_p(self.out.ctypes.data),
            ctypes.c_int64(_ROOM),
        )
        if not pointer:
            raise MemoryError("there is no memory for a reader of requests.")
        self._native = native
        self.pointer = pointer

    def __del__(self):
        if hasattr(self, "pointer"):
            self._native.JaxembedReaderDelete(self.pointer)


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * max(len(values), 1))(*values)
