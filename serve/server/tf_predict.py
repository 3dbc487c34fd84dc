"""TensorFlow Serving's REST predict: rows as `instances`, or columns as `inputs`.

    {"instances": [{"user": 7, "history": [1, 2], "dense": [0.5, 1.0]}, ...]}
    {"inputs": {"user": [7, ...], "history": [[1, 2], ...], "dense": [[0.5, 1.0], ...]}}

Columns may be ragged as those of v2: "history": [1, 2, ...], "history.row_splits": [0, 2, ...]. Where a feature takes
strings, {"b64": "YW5u"} is the string whose bytes that is in base64.

References:
  https://www.tensorflow.org/tfx/serving/api_rest, "Predict API".
"""

import base64
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import bad_request, too_many_rows
from .request import ROW_SPLITS, WEIGHTS, InferenceRequest
from .served import ServedModel
from .signature import Signature
from .strings import takes_strings
from .tensors import check_number, ragged
from .v2_json import as_json, as_known, in_pieces, read_object, to_json

_SIGNATURE = "serving_default"
_ENCODED = {"b64"}
_TYPES = {
    "float32": "DT_FLOAT",
    "float64": "DT_DOUBLE",
    "float16": "DT_HALF",
    "bfloat16": "DT_BFLOAT16",
    "int8": "DT_INT8",
    "int16": "DT_INT16",
    "int32": "DT_INT32",
    "int64": "DT_INT64",
    "uint8": "DT_UINT8",
    "uint16": "DT_UINT16",
    "uint32": "DT_UINT32",
    "uint64": "DT_UINT64",
    "bool": "DT_BOOL",
}


def read(signature: Signature, body: bytes) -> tuple[InferenceRequest, bool]:
    """A request, and whether it is of rows.

    Raises:
      RequestError: if it is not one.
    """
    data = read_object(body)
    if data.get("signature_name", _SIGNATURE) not in (_SIGNATURE, ""):
        raise bad_request(f"signature_name must be {_SIGNATURE!r}, got {str(data['signature_name'])[:80]!r}.")
    if ("instances" in data) == ("inputs" in data):
        raise bad_request("the body must have one of 'instances' and 'inputs'.")
    by_row = "instances" in data
    columns = _columns(signature, data["instances"]) if by_row else _named(signature, data["inputs"])
    # numpy takes True for a number beside others. Lists are only looked through where the text may have one: the types
    # of all entries would cost nearly as much as their numbers. Text with a null byte is UTF-16, or UTF-32.
    if signature.dense and (b"true" in body or b"false" in body or b"\0" in body):
        for name in signature.dense.keys() & columns.keys():
            _check_no_booleans(name, columns[name], signature.dense[name])
    return _request(signature, columns, by_row), by_row


def write(by_row: bool, outputs: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """A response; an only output goes without its name."""
    names = [name for name, _ in outputs]
    if len(names) == 1:
        content = as_json(outputs[0][1])
    elif by_row and len(outputs[0][1]):
        arrays = [as_known(array) for _, array in outputs]

        def as_rows(piece: range) -> list[dict[str, Any]]:
            parts = (array[piece.start : piece.stop] for array in arrays)
            return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]

        rows = len(arrays[0])
        content = in_pieces(range(rows), sum(array.size for array in arrays) // rows, as_rows)
    else:
        content = [] if by_row else {name: as_json(array) for name, array in outputs}
    return to_json({"predictions" if by_row else "outputs": content})


def metadata(model: ServedModel, name: str) -> dict[str, Any]:
    """The metadata of a model; sizes that vary are -1, as is the length of a bag."""
    inputs: dict[str, Any] = {}
    for path, feature in model.signature.features.items():
        inputs[path] = _tensor_info("DT_STRING" if takes_strings(feature) else "DT_INT64", (-1, -1))
        if feature.weighted:
            inputs[path + WEIGHTS] = _tensor_info("DT_FLOAT", (-1, -1))
    for key, shape in model.signature.dense.items():
        inputs[key] = _tensor_info("DT_FLOAT", (-1, *shape))
    outputs = {
        output.name: _tensor_info(_TYPES.get(output.dtype.name, "DT_INVALID"), (-1, *output.shape))
        for output in model.signature.outputs
    }
    signature = {"inputs": inputs, "outputs": outputs, "method_name": "tensorflow/serving/predict"}
    return {
        "model_spec": {"name": name, "signature_name": "", "version": str(model.version)},
        "metadata": {"signature_def": {"signature_def": {_SIGNATURE: signature}}},
    }


def _tensor_info(dtype: str, shape: Sequence[int]) -> dict[str, Any]:
    dims = [{"size": str(size), "name": ""} for size in shape]
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": ""}


def _columns(signature: Signature, rows: Any) -> dict[str, list[Any]]:
    if not isinstance(rows, list) or not rows:
        raise bad_request(f"instances must be a list of at least one row, got {str(rows)[:80]}.")
    if len(rows) > signature.max_rows:
        raise too_many_rows(len(rows), signature.max_rows)
    if not all(isinstance(row, dict) for row in rows) or _is_string(signature, rows[0]):
        name = _only_input(signature, "instances must be objects by name of input")
        return {name: rows}
    keys = rows[0].keys()
    check_number(signature, len(keys))
    for at, row in enumerate(rows):
        if row.keys() != keys:
            raise bad_request(
                f"instances[{at}] must have the inputs of the first, {str(list(keys))[:200]}, got {str(list(row))[:200]}."
            )
    return {key: [row[key] for row in rows] for key in keys}


def _is_string(signature: Signature, row: dict[str, Any]) -> bool:
    return row.keys() == _ENCODED and not _ENCODED & signature.features.keys()


def _named(signature: Signature, inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, dict):
        check_number(signature, len(inputs))
        return dict(inputs)
    return {_only_input(signature, "inputs must be an object by name of input"): inputs}


def _only_input(signature: Signature, otherwise: str) -> str:
    names = [*signature.features, *signature.dense]
    if len(names) > 1:
        raise bad_request(f"{otherwise}; inputs are {names}.")
    return names[0]


def _request(signature: Signature, columns: dict[str, Any], by_row: bool) -> InferenceRequest:
    inputs: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for path in signature.features:
        if path not in columns:
            continue
        ids = columns.pop(path)
        if not isinstance(ids, list):
            raise bad_request(f"input {path!r} must be a list, got {str(ids)[:80]}.")
        splits = None if by_row else columns.pop(path + ROW_SPLITS, None)
        weight = columns.pop(path + WEIGHTS, None)
        rows = len(splits) - 1 if isinstance(splits, list) else len(ids)
        if rows > signature.max_rows:
            raise too_many_rows(rows, signature.max_rows)
        strings = path in signature.strings
        if strings:
            ids = _decoded(path, ids)
        if splits is not None:
            values = _strings(path, ids) if strings else _integers(path, ids)
            inputs[path] = ragged(path, values, _integers(path + ROW_SPLITS, splits), strings)
            if weight is not None:
                weights[path] = _rows_of(path, weight, splits)
            continue
        bags = weight is not None or not isinstance(signature.features[path].config.table.combiner, str)
        if bags and ids and not any(isinstance(bag, list) for bag in ids):
            ids = [[id_] for id_ in ids]  # one id a row
            weight = [w if isinstance(w, list) else [w] for w in weight] if isinstance(weight, list) else weight
        inputs[path] = ids
        if weight is not None:
            weights[path] = weight
    dense = {name: columns.pop(name) for name in signature.dense if name in columns}
    if columns:
        known = [*signature.features, *signature.dense]
        raise bad_request(f"input {next(iter(columns))[:100]!r} is unknown; inputs are {known}.")
    return InferenceRequest(inputs, weights, dense)


def _check_no_booleans(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Refuses True and False in a dense input of rows of `shape`; one that is of another shape is left to be refused."""
    if not isinstance(values, list):
        return
    whole = (len(values), *shape)
    for _ in shape:
        if set(map(type, values)) != {list}:
            return
        values = list(itertools.chain.from_iterable(values))
    at = next((at for at, value in enumerate(values) if type(value) is bool), None)
    if at is not None and len(values) == math.prod(whole):
        row, *position = map(int, np.unravel_index(at, whole))
        raise bad_request(
            f"dense input {name!r}, row {row}, position {position}: must hold numbers, got {values[at]}."
        )


def _decoded(name: str, ids: list[Any]) -> list[Any]:
    """Ids, or bags of them, with the bytes that objects stand for."""
    kinds = set(map(type, ids))
    if kinds == {list}:
        kinds = set(map(type, itertools.chain.from_iterable(ids)))
    if dict not in kinds:
        return ids
    return [[_string(name, id_) for id_ in bag] if type(bag) is list else _string(name, bag) for bag in ids]


def _string(name: str, value: Any) -> Any:
    if type(value) is not dict:
        return value
    try:
        if value.keys() == _ENCODED and type(value["b64"]) is str:
            return base64.b64decode(value["b64"], validate=True)
    except ValueError:
        pass
    raise bad_request(
        f'input {name!r}: an object must be {{"b64": a string in base64}}, got {str(value)[:80]}.'
    )


def _strings(name: str, values: list[Any]) -> np.ndarray:
    if not set(map(type, values)) <= {str, bytes}:
        raise bad_request(f"input {name!r} must be a list of strings, got {str(values)[:80]}.")
    found = np.empty(len(values), object)
    found[:] = values
    return found


def _integers(name: str, values: Any) -> np.ndarray:
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise bad_request(f"input {name!r} must be a list of ints, got {str(values)[:80]}.")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise bad_request(f"input {name!r} must be of 64-bit ints, got {max(values, key=abs)!s:.80}.") from None


def _rows_of(path: str, weight: Any, splits: list[int]) -> list[Any]:
    if not isinstance(weight, list) or len(weight) != splits[-1]:
        raise bad_request(f"Weight for {path!r} must be a list of {splits[-1]} numbers, parallel to its ids.")
    return [weight[start:stop] for start, stop in itertools.pairwise(splits)]
