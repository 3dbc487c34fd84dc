"""Open Inference Protocol v2 over gRPC: messages to requests, and outputs to messages."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.serve.rows import Rows

from .errors import bad_request
from .messages import METHODS
from .native_reader import NativeReader
from .request import LARGE, Flat, InferenceRequest, outputs_from, text_from, timeout_from
from .served import ServedModel
from .signature import Signature
from .tensors import assemble, check_number, check_rows, datatype_of, dtype_of, from_bytes, from_list

_MICROSECONDS = 1e6
#: By kind and size of a type, the field of InferTensorContents that holds it; 16-bit floats have none.
_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def message_of(body: bytes) -> Any:
    """The ModelInferRequest in some bytes.

    Raises:
      RequestError: if there is none.
    """
    try:
        return METHODS["ModelInfer"][0].FromString(body)
    except Exception:
        raise bad_request("the message cannot be read.") from None


def read_natively(reader: NativeReader, body: bytes) -> tuple[Any, Rows] | None:
    """A ModelInferRequest without its tensors, and the rows that these make up; None for what the reader leaves alone."""
    found = reader.message(body)
    return None if found is None or len(found[1]) >= LARGE else (message_of(found[1]), found[0])


def read(signature: Signature, message: Any) -> InferenceRequest:
    """The request of a ModelInferRequest.

    Raises:
      RequestError: if it is not one of the model.
    """
    check_number(signature, len(message.inputs))
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise bad_request(
            f"raw_input_contents must have one entry for each of {len(message.inputs)} inputs, got {len(raw)}."
        )
    tensors = []
    names = [text_from(entry.name, "the name of an input") for entry in message.inputs]
    shapes = [tuple(entry.shape) for entry in message.inputs]
    check_rows(signature, dict(zip(names, shapes, strict=True)))
    for at, (name, shape, entry) in enumerate(zip(names, shapes, message.inputs, strict=True)):
        if raw:
            if entry.HasField("contents"):
                raise bad_request(f"input {name!r} has contents beside raw_input_contents; send one of them.")
            tensors.append(from_bytes(name, entry.datatype, shape, raw[at]))
            continue
        dtype_of(name, entry.datatype)
        field = _FIELDS.get(entry.datatype)
        if field is None:
            raise bad_request(f"input {name!r}: {entry.datatype} must be sent in raw_input_contents.")
        tensors.append(from_list(name, entry.datatype, shape, list(getattr(entry.contents, field))))
    return request(message, *assemble(signature, tensors))


def request(
    message: Any, inputs: dict[str, Any] | Flat | Rows, weights: dict[str, Any], dense: dict[str, Any]
) -> InferenceRequest:
    """A request of tensors that were read, and of what else its message says.

    Raises:
      RequestError: if that is not of the form it must be.
    """
    outputs = outputs_from(entry.name for entry in message.outputs) if message.outputs else None
    timeout = None
    if "timeout" in message.parameters:
        choice = message.parameters["timeout"].WhichOneof("parameter_choice")
        timeout = timeout_from(choice and getattr(message.parameters["timeout"], choice), _MICROSECONDS)
    return InferenceRequest(inputs, weights, dense, outputs, message.id or None, timeout)


def write(
    model: ServedModel, name: str, request: InferenceRequest, outputs: Sequence[tuple[str, np.ndarray]]
) -> Any:
    """A ModelInferResponse, with raw contents."""
    response: Any = METHODS["ModelInfer"][1](
        model_name=name, model_version=str(model.version), id=request.id or ""
    )
    for output, array in outputs:
        response.outputs.add(name=output, datatype=datatype_of(array.dtype), shape=array.shape)
        response.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
    return response
