"""NativeReader: the usual requests, read by native code straight into the buffers of a lookup."""

import ctypes
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


def make_reader(signature: Signature) -> "NativeReader | None":
    """The reader of a model's requests; None where they are read in Python."""
    native = library()
    if native is None or not signature.takes_flat or not signature.features:
        return None
    return NativeReader(native, signature)


class NativeReader:
    """Reads, checks and packs requests of all features and dense inputs, in one of the three encodings of v2.

    It reads what clients usually send, and leaves everything else alone: weights, other types than INT64, INT32
    and FP32, escapes in names, and whatever is wrong, about which the readers in Python have more to say.

    Args:
      native: the library.
      signature: of the model, with `takes_flat` and at least one feature.
    """

    def __init__(self, native: ctypes.CDLL, signature: Signature):
        self._native, self._signature = native, signature
        self._weighted = any(feature.weighted for feature in signature.features.values())
        self._read, self._write = native.JaxembedReaderRead, native.JaxembedReaderWrite
        self._shapes = list(signature.dense.values())
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
        rows, spans = found
        return rows, b"{%b}" % b",".join([body[start:end] for start, end in spans]) if spans else b"{}"

    def message(self, body: bytes) -> tuple[Rows, bytes] | None:
        """Rows of a ModelInferRequest, and the message that its other fields make up; None leaves it alone.

        Raises:
          RequestError: if it has too many rows.
        """
        found = self._rows(body, -1)
        if found is None:
            return None
        rows, spans = found
        return rows, b"".join([body[start:end] for start, end in spans])

    def _rows(self, body: bytes, json_size: int) -> tuple[Rows, list[tuple[int, int]]] | None:
        try:
            handle = self._spare.pop()
        except IndexError:
            handle = _Handle(self._native, self._signature)
        written = False
        try:
            if not self._read(handle.pointer, body, json_size, len(body), handle.sizes_address):
                return None
            num_rows, total, num_spans = handle.sizes[:3].tolist()
            if num_rows > self._signature.max_rows:
                raise too_many_rows(num_rows, self._signature.max_rows)
            ids = np.empty(total, np.int32)
            splits = np.empty((len(self._signature.features), num_rows + 1), np.int32)
            dense = [np.empty((num_rows, *shape), np.float32) for shape in self._shapes]
            for i, array in enumerate(dense):
                handle.dense[i] = array.ctypes.data
            if not self._write(handle.pointer, ids.ctypes.data, splits.ctypes.data, handle.dense):
                return None
            ends = handle.sizes[3 : 3 + 2 * num_spans].tolist()
            written = True
        finally:
            # One that was left early holds what it parsed.
            if written or len(body) < _SMALL:
                self._spare.append(handle)
        weights = np.ones(total, np.float32) if self._weighted else None
        return Rows(Packed(num_rows, ids, splits, weights), dense), list(
            zip(ends[::2], ends[1::2], strict=True)
        )


class _Handle:
    """What one request at a time is read with."""

    def __init__(self, native: ctypes.CDLL, signature: Signature):
        features, shapes = signature.features, list(signature.dense.values())
        names = [name.encode() for path in features for name in (path, path + ROW_SPLITS)]
        names += [name.encode() for name in signature.dense]
        pointer = native.JaxembedReaderNew(
            ctypes.c_int64(len(features)),
            ctypes.c_int64(len(shapes)),
            (ctypes.c_char_p * len(names))(*names),
            _array(ctypes.c_uint32, [f.config.table.vocabulary_size for f in features.values()]),
            _array(ctypes.c_int32, [f.max_ids for f in features.values()]),
            _array(ctypes.c_int64, [len(shape) for shape in shapes]),
            _array(ctypes.c_int64, [size for shape in shapes for size in shape]),
        )
        if not pointer:
            raise MemoryError("there is no memory for a reader of requests.")
        self._native = native
        self.pointer = pointer
        self.sizes = np.zeros(_SIZES, np.int64)
        self.sizes_address = self.sizes.ctypes.data
        self.dense = (ctypes.c_void_p * max(len(shapes), 1))()

    def __del__(self):
        if hasattr(self, "pointer"):
            self._native.JaxembedReaderDelete(self.pointer)


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * max(len(values), 1))(*values)
