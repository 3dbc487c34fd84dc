"""Tensors of the Open Inference Protocol: their types, and how they make up ragged features.

A feature FEATURE of B rows comes as one of

    FEATURE [B]                                one id a row
    FEATURE [B, L]                             L ids a row
    FEATURE [N], FEATURE.row_splits [B + 1]    ids of row b: from row_splits[b] to row_splits[b + 1]

and its weights as FEATURE.weights, of the shape of FEATURE. Dense inputs are [B, ...]. Ids are integers, or BYTES where
the feature takes strings.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxembed.inputs import RaggedTensor

from .errors import bad_request, too_many_rows
from .request import ROW_SPLITS, WEIGHTS, Flat, refuse_repeated
from .signature import Signature
from .strings import from_elements, takes_strings

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits}")
        for kind in ("INT", "UINT")
        for bits in (8, 16, 32, 64)
    },
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(object),
}
_LITTLE_ENDIAN = {name: dtype.newbyteorder("<") for name, dtype in DATATYPES.items() if name != "BYTES"}
_PLAIN = frozenset((np.dtype(np.int32), np.dtype(np.int64)))
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class Tensor(NamedTuple):
    """A named array, as it was sent."""

    name: str
    array: np.ndarray


def datatype_of(dtype: np.dtype) -> str:
    """The protocol's name of a type of numpy."""
    return _NAMES[np.dtype(dtype)]


def dtype_of(name: str, datatype: Any) -> np.dtype:
    """The type of numpy of tensor `name`.

    Raises:
      RequestError: if there is none.
    """
    dtype = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise bad_request(
            f"input {name!r}: datatype must be one of {list(DATATYPES)}, got {str(datatype)[:40]!r}."
        )
    return dtype


def shape_of(name: str, shape: Any) -> tuple[int, ...]:
    """A shape that was sent.

    Raises:
      RequestError: if it is none, or of more entries than there can be.
    """
    sizes = shape if isinstance(shape, list | tuple) else None
    if (
        sizes is None
        or not 1 <= len(sizes) <= 8
        or not all(type(size) is int and 0 <= size < 2**31 for size in sizes)
        or math.prod(sizes) >= 2**31
    ):
        raise bad_request(f"input {name!r}: shape must be 1 to 8 sizes of at least 0, got {str(shape)[:80]}.")
    return tuple(sizes)


def check_number(signature: Signature, number: int) -> None:
    """Refuses more tensors than the model has inputs, before anything is made of them.

    Raises:
      RequestError: if there are more.
    """
    if number > signature.max_inputs:
        known = [*signature.features, *signature.dense]
        raise bad_request(
            f"a request has at most {signature.max_inputs} inputs, got {number}; inputs are {known}."
        )


def check_rows(signature: Signature, shapes: Mapping[str, Any]) -> None:
    """Refuses too many rows before any value is read: rows without ids take no bytes in a request.

    Args:
      signature: of the model.
      shapes: by name of tensor, as they were sent.

    Raises:
      RequestError: if there are too many rows.
    """
    for ids, splits in zip(*signature.tensor_names, strict=True):
        shape = shapes.get(splits) if splits in shapes else shapes.get(ids)
        size = shape[0] if isinstance(shape, list | tuple) and shape else None
        if type(size) is int and signature.max_rows + (splits in shapes) < size < 2**31:
            raise too_many_rows(size - (splits in shapes), signature.max_rows)


def from_bytes(name: str, datatype: Any, shape: Any, data: Any) -> Tensor:
    """A tensor sent as its little-endian bytes, which are used in place.

    Raises:
      RequestError: if they are not of that type and shape.
    """
    try:
        # One dimension, as ids and splits have, needs no more than this.
        (size,) = shape
        if type(size) is int and size >= 0:
            dtype = _LITTLE_ENDIAN[datatype]
            if size * dtype.itemsize == len(data):
                return Tensor(name, np.frombuffer(data, dtype))
    except (ValueError, TypeError, KeyError):
        pass
    dtype, sizes = dtype_of(name, datatype), shape_of(name, shape)
    if dtype.kind == "O":
        return Tensor(name, from_elements(name, math.prod(sizes), data).reshape(sizes))
    expected = math.prod(sizes) * dtype.itemsize
    if len(data) != expected:
        raise bad_request(
            f"input {name!r}: {datatype} of shape {list(sizes)} is {expected} bytes, got {len(data)}."
        )
    return Tensor(name, np.frombuffer(data, dtype.newbyteorder("<")).reshape(sizes))


def from_list(name: str, datatype: Any, shape: Any, data: Any) -> Tensor:
    """A tensor sent as a list, flat or nested as its shape.

    Raises:
      RequestError: if its entries are not of that type and number.
    """
    dtype, sizes = dtype_of(name, datatype), shape_of(name, shape)
    if not isinstance(data, list):
        raise bad_request(f"input {name!r}: data must be a list, got {type(data).__name__}.")
    for size in sizes[1:]:
        if data and type(data[0]) is list:
            if not set(map(type, data)) <= {list}:
                raise bad_request(f"input {name!r}: data mixes lists and values.")
            # Of the right number altogether, they would be rows of other lengths, whose values move.
            odd = set(map(len, data)) - {size}
            if odd:
                raise bad_request(
                    f"input {name!r}: data has a list of {min(odd)} where shape {list(sizes)} has {size}; nest it as its "
                    "shape, or send it flat."
                )
            data = list(chain.from_iterable(data))
    if len(data) != math.prod(sizes):
        raise bad_request(
            f"input {name!r}: shape {list(sizes)} holds {math.prod(sizes)} values, got {len(data)}."
        )
    allowed = {"b": {bool}, "i": {int}, "u": {int}, "O": {str, bytes}}.get(dtype.kind, {int, float})
    if not set(map(type, data)) <= allowed:
        odd = next(i for i, value in enumerate(data) if type(value) not in allowed)
        raise bad_request(f"input {name!r}, position {odd}: {datatype} expected, got {str(data[odd])[:40]!r}.")
    try:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            # ml_dtypes takes no ints beyond 64 bits.
            array = np.array(data, np.float64 if dtype.kind == "V" else dtype)
            return Tensor(name, array.astype(dtype, copy=False).reshape(sizes))
    except (OverflowError, ValueError):
        raise bad_request(f"input {name!r}: {datatype} cannot hold some value of data.") from None


def assemble(
    signature: Signature, tensors: Sequence[Tensor]
) -> tuple[dict[str, Any] | Flat, dict[str, Any], dict[str, np.ndarray]]:
    """Features, weights and dense inputs of the tensors of a request.

    Raises:
      RequestError: if a tensor is unknown, there twice, or not of a shape above, or there are too many rows.
    """
    by_name = dict(tensors)
    if len(by_name) != len(tensors):
        refuse_repeated("input", [tensor.name for tensor in tensors])
    flat = _flat(signature, by_name) if signature.takes_flat else None
    if flat is not None:
        return flat, {}, {n: _numbers(n, by_name[n]) for n in signature.dense if n in by_name}
    inputs: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for path in signature.features:
        if path in by_name:
            ids, splits = by_name.pop(path), by_name.pop(path + ROW_SPLITS, None)
            inputs[path] = ragged(path, ids, splits, takes_strings(signature.features[path]))
            weight = by_name.pop(path + WEIGHTS, None)
            if weight is not None:
                weights[path] = _weights(path, weight, ids, inputs[path])
    dense = {name: _numbers(name, by_name.pop(name)) for name in signature.dense if name in by_name}
    if by_name:
        raise bad_request(_unknown(next(iter(by_name)), signature))
    return inputs, weights, dense


def _flat(signature: Signature, by_name: dict[str, np.ndarray]) -> Flat | None:
    """All features at once, if all come with row splits and alike; None for others, and for bad ones."""
    id_names, split_names = signature.tensor_names
    if len(by_name) != 2 * len(id_names) + len(signature.dense.keys() & by_name.keys()):
        return None
    try:
        ids = [by_name[name] for name in id_names]
        splits = [by_name[name] for name in split_names]
    except KeyError:
        return None
    if len({(a.dtype, a.ndim) for a in ids}) != 1 or len({(a.dtype, a.shape) for a in splits}) != 1:
        return None
    first = splits[0]
    if (
        ids[0].ndim != 1
        or ids[0].dtype not in _PLAIN
        or first.ndim != 1
        or first.dtype not in _PLAIN
        or not first.size
    ):
        return None
    borders = np.concatenate(splits).reshape(len(splits), first.size)
    lengths = borders[:, 1:] - borders[:, :-1]
    sizes = np.array([a.size for a in ids])
    if borders[:, 0].any() or (borders[:, -1] != sizes).any() or (borders[:, 1:] < borders[:, :-1]).any():
        return None
    return Flat(np.concatenate(ids), lengths)


def ragged(path: str, ids: np.ndarray, splits: np.ndarray | None, strings: bool = False) -> RaggedTensor:
    """The bags of a feature.

    Raises:
      RequestError: if ids are no integers (BYTES for `strings`), or the splits do not rise from 0 to N.
    """
    if ids.dtype.kind not in ("O" if strings else "iu"):
        wanted = "BYTES" if strings else "integers"
        hint = "; look strings up in a vocabulary or hash them first" if ids.dtype.kind == "O" else ""
        raise bad_request(f"Feature {path!r}: ids must be {wanted}, got {datatype_of(ids.dtype)}{hint}.")
    if splits is None:
        if ids.ndim > 2:
            raise bad_request(f"Feature {path!r} must be [B] or [B, L], got shape {list(ids.shape)}.")
        length = 1 if ids.ndim == 1 else ids.shape[1]
        splits = np.arange(ids.shape[0] + 1, dtype=np.int64) * length
        return RaggedTensor(ids.reshape(-1), splits)
    what = f"input {path + ROW_SPLITS!r}"
    if splits.ndim != 1 or splits.dtype.kind not in "iu" or splits.size == 0:
        raise bad_request(
            f"{what} must be integers [B + 1], got {datatype_of(splits.dtype)} {list(splits.shape)}."
        )
    if ids.ndim != 1:
        raise bad_request(f"Feature {path!r} with row_splits must be [N], got shape {list(ids.shape)}.")
    if splits[0] != 0 or splits[-1] != ids.size:
        raise bad_request(f"{what} must go from 0 to N = {ids.size}, got {splits[0]} to {splits[-1]}.")
    falls = np.flatnonzero(splits[1:] < splits[:-1])
    if falls.size:
        raise bad_request(
            f"{what} must not decrease, got {splits[falls[0]]}, {splits[falls[0] + 1]} at row {falls[0]}."
        )
    return RaggedTensor(ids, splits.astype(np.int64, copy=False))


def _weights(path: str, weight: np.ndarray, ids: np.ndarray, bags: RaggedTensor) -> RaggedTensor:
    if weight.shape != ids.shape:
        raise bad_request(
            f"Weight for {path!r} must be parallel to its ids of shape {list(ids.shape)}, got {list(weight.shape)}."
        )
    if _numbers(path + WEIGHTS, weight).dtype.kind in "iu":
        weight = weight.astype(np.float32)
    return RaggedTensor(weight.reshape(-1), bags.row_splits)


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "O":
        raise bad_request(f"input {name!r} must be numbers, got BYTES.")
    return array


def _unknown(name: str, signature: Signature) -> str:
    for suffix, what in ((ROW_SPLITS, "row splits"), (WEIGHTS, "weights")):
        base = name.removesuffix(suffix)
        if base != name and base in signature.features:
            return f"input {name!r} are {what} of a feature {base!r} that is missing."
    known = [*signature.features, *signature.dense]
    return f"input {name[:100]!r} is unknown; inputs are {known}."
