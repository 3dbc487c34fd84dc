"""safetensors files whose data starts on a page, so that they are mapped instead of read."""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, refuse_pointer
from jaxembed.serialization import strict_json

ALIGNMENT, TENSOR_ALIGNMENT = 4096, 64
MAX_HEADER = 100 << 20
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def header_of(
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file of these tensors (type and shape by name), to be followed by their bytes in order.

    Raises:
      ValueError: if the format has no such type.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if np.dtype(dtype) not in _NAMES:
            raise ValueError(f"safetensors cannot hold {np.dtype(dtype).name}, the type of {name!r}.")
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def with_padding(tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The same tensors with bytes between them, so that each starts on a boundary from which it can be used in place."""
    padded, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        missing = -offset % TENSOR_ALIGNMENT
        if missing:
            padded[f"padding.{name}"] = (np.dtype(np.uint8), (missing,))
        padded[name] = (dtype, shape)
        offset += missing + math.prod(shape) * np.dtype(dtype).itemsize
    return padded


def map_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, read-only and mapped: no data is read, none is copied.

    Raises:
      CheckpointError: if it is no such file, or a symbolic link, or has tensors that numpy has no type for.
    """
    tensors, _, others = map_file(file)
    if others:
        raise CheckpointError(f"{file} is damaged: it has {others[0]!r:.80}, of a type that is not known.")
    return tensors


def map_file(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """As `map_tensors`; what the file says of itself; and the names, with their types, of tensors that numpy has no type for.

    Raises:
      CheckpointError: if it is no such file, or a symbolic link.
    """
    descriptor, size = open_regular(file)
    try:
        start = os.pread(descriptor, 64, 0)
        refuse_pointer(file, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file} is no safetensors file, or is truncated: {size} bytes.")
        header = os.pread(descriptor, length, 8)
        try:
            entries = strict_json(header)
            tensors, others = _parse(entries, size - 8 - length)
            metadata = {str(key): str(value) for key, value in (entries.get("__metadata__") or {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise CheckpointError(f"{file} is no safetensors file, or is damaged: {e}") from e
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    arrays = {
        name: np.frombuffer(mapped, dtype, math.prod(shape), 8 + length + offset).reshape(shape)
        for name, (dtype, shape, offset) in tensors.items()
    }
    return arrays, metadata, others


def _parse(header: Any, data_size: int) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], list[str]]:
    tensors, others, used = {}, [], 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    # Other programs need not list them in order.
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**62 for n in numbers):
            raise ValueError(f"tensor {name!r:.80} has impossible sizes.")
        dtype = _DTYPES.get(str(entry["dtype"]))
        is_whole = dtype is None or end - begin == math.prod(shape) * dtype.itemsize
        if begin != used or not begin <= end <= data_size or not is_whole:
            raise ValueError(f"tensor {name!r:.80} does not lie where its shape says.")
        if dtype is None:
            others.append(f"{name} ({entry['dtype']})")
        else:
            tensors[name] = (dtype, shape, begin)
        used = end
    if used != data_size:
        raise ValueError(f"it has {data_size} bytes of data, its header describes {used}.")
    return tensors, others
