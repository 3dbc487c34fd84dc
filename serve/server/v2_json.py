"""Open Inference Protocol v2 over REST, in JSON.

References:
  https://github.com/kserve/open-inference-protocol, "Inference Request JSON Object".
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from jaxembed.serialization import strict_json
from jaxembed.serve.rows import Rows

from .errors import bad_request
from .request import Flat, InferenceRequest, outputs_from, text_from, timeout_from
from .served import ServedModel
from .signature import Signature
from .strings import takes_strings
from .tensors import assemble, check_number, check_rows, datatype_of, from_bytes, from_list

_MICROSECONDS = 1e6
_PIECE = 1 << 16  # numbers, which take some milliseconds to write


def read_object(body: Any) -> dict[str, Any]:
    """A JSON object.

    Raises:
      RequestError: if it is none.
    """
    try:
        data = strict_json(bytes(body))
    except ValueError as e:
        raise bad_request(f"the body is {str(e)[:200]}") from None
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, got {type(data).__name__}.")
    return data


def read(signature: Signature, data: dict[str, Any], binary: memoryview) -> InferenceRequest:
    """A request.

    Args:
      signature: of the model.
      data: the JSON object.
      binary: what follows it: the tensors with parameter "binary_data_size", one after the other.

    Raises:
      RequestError: if it is not one.
    """
    tensors, at = [], 0
    entries = _objects(data.get("inputs"), "inputs")
    check_number(signature, len(entries))
    names = [text_from(entry.get("name"), "the name of an input") for entry in entries]
    check_rows(signature, {name: entry.get("shape") for name, entry in zip(names, entries, strict=True)})
    for name, entry in zip(names, entries, strict=True):
        parameters = entry.get("parameters")
        size = None
        if parameters is not None:
            size = _parameters(entry).get("binary_data_size")
        if size is None:
            tensors.append(from_list(name, entry.get("datatype"), entry.get("shape"), entry.get("data")))
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - at:
            raise bad_request(
                f"input {name!r}: binary_data_size must be at most the {len(binary) - at} bytes left, got {str(size)[:40]}."
            )
        tensors.append(from_bytes(name, entry.get("datatype"), entry.get("shape"), binary[at : at + size]))
        at += size
    if at != len(binary):
        raise bad_request(f"the body has {len(binary) - at} bytes that belong to no input.")
    return request(data, *assemble(signature, tensors))


def request(
    data: dict[str, Any], inputs: dict[str, Any] | Flat | Rows, weights: dict[str, Any], dense: dict[str, Any]
) -> InferenceRequest:
    """A request of tensors that were read, and of what else its JSON object says.

    Raises:
      RequestError: if that is not of the form it must be.
    """
    outputs = None
    if data.get("outputs"):
        outputs = outputs_from(entry.get("name") for entry in _objects(data["outputs"], "outputs"))
    identifier = data.get("id")
    return InferenceRequest(
        inputs,
        weights,
        dense,
        outputs,
        None if identifier is None else text_from(identifier, "id"),
        timeout_from(_parameters(data).get("timeout"), _MICROSECONDS),
    )


def binary_outputs(data: dict[str, Any]) -> set[str] | bool:
    """The outputs that are to be answered in binary; True for all of them.

    Raises:
      RequestError: if the parameters are not objects.
    """
    entries = _objects(data["outputs"], "outputs") if data.get("outputs") else []
    if not entries:
        return _parameters(data).get("binary_data_output") is True
    everything = _parameters(data).get("binary_data_output") is True
    return {
        text_from(entry.get("name"), "the name of an output")
        for entry in entries
        if _parameters(entry).get("binary_data", everything) is True
    }


def write(
    model: ServedModel,
    name: str,
    request: InferenceRequest,
    outputs: Sequence[tuple[str, np.ndarray]],
    binary: set[str] | bool = False,
) -> tuple[bytes, list[bytes]]:
    """A response: its JSON, and what follows it.

    Numbers that are not finite are null in JSON, which has no such numbers.
    """
    entries, parts = [], []
    for output, array in outputs:
        entry: dict[str, Any] = {
            "name": output,
            "datatype": datatype_of(array.dtype),
            "shape": list(array.shape),
        }
        if binary is True or (binary and output in binary):
            parts.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = as_json(array.reshape(-1))
        entries.append(entry)
    response: dict[str, Any] = {"model_name": name, "model_version": str(model.version), "outputs": entries}
    if request.id is not None:
        response["id"] = request.id
    return to_json(response), parts


def to_json(value: Any) -> bytes:
    """JSON of a value in which arrays are those of `as_json`; numbers that are not finite are null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def as_json(array: np.ndarray) -> Any:
    """What `to_json` takes for an array: itself, of a type that it knows; the text of a large one."""
    array = as_known(array)
    return array if array.size <= _PIECE else in_pieces(array, array.size // len(array), lambda piece: piece)


def as_known(array: np.ndarray) -> np.ndarray:
    """An array that orjson takes: contiguous, and of a type that it knows."""
    if array.dtype.kind not in "biuf" or array.dtype == np.float16:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def in_pieces(rows: Any, width: int, content: Callable[[Any], Any]) -> orjson.Fragment:
    """The list that the pieces of `rows` make up, written one by one: other threads get the interpreter in between.

    Args:
      rows: at least one; slices of it are pieces.
      width: numbers of one row.
      content: the list, or array, that a piece is written as.
    """
    step = max(_PIECE // max(width, 1), 1)
    pieces = [to_json(content(rows[first : first + step]))[1:-1] for first in range(0, len(rows), step)]
    return orjson.Fragment(b"[%b]" % b",".join(pieces))


def metadata(model: ServedModel, name: str, versions: Sequence[int]) -> dict[str, Any]:
    """The metadata of a model; sizes that vary are -1."""
    inputs = []
    for path, feature in model.signature.features.items():
        datatype = "BYTES" if takes_strings(feature) else "INT64"
        inputs.append({"name": path, "datatype": datatype, "shape": [-1]})
        inputs.append({"name": path + ".row_splits", "datatype": "INT64", "shape": [-1]})
        if feature.weighted:
            inputs.append({"name": path + ".weights", "datatype": "FP32", "shape": [-1]})
    inputs += [
        {"name": key, "datatype": "FP32", "shape": [-1, *shape]} for key, shape in model.signature.dense.items()
    ]
    outputs = [
        {"name": output.name, "datatype": datatype_of(output.dtype), "shape": [-1, *output.shape]}
        for output in model.signature.outputs
    ]
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": "jaxembed",
        "inputs": inputs,
        "outputs": outputs,
    }


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise bad_request(f"{what} must be a list of objects, got {str(value)[:80]}.")
    return value


def _parameters(data: dict[str, Any]) -> dict[str, Any]:
    parameters = data.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise bad_request(f"parameters must be an object, got {str(parameters)[:80]}.")
    return parameters
