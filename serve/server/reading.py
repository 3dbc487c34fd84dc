"""What a process apart does with a large request: reads it in Python, and packs it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxembed.serve.rows import Rows

from . import tf_predict, v2_binary, v2_grpc
from .errors import RequestError
from .request import InferenceRequest
from .request_packer import RequestPacker
from .signature import Signature


def _v2(
    packer: RequestPacker, signature: Signature, body: bytes, header: str | None
) -> tuple[InferenceRequest, set[str] | bool]:
    read, wanted = v2_binary.read_in_python(signature, body, header)
    return _packed(packer, read), wanted


def _predict(packer: RequestPacker, signature: Signature, body: bytes) -> tuple[InferenceRequest, bool]:
    read, by_row = tf_predict.read(signature, body)
    return _packed(packer, read), by_row


def _message(
    packer: RequestPacker, signature: Signature, body: bytes
) -> tuple[str, str, InferenceRequest | dict[str, Any]]:
    """Name and version of the model that it is for, and the request, or what a RequestError says of it."""
    message = v2_grpc.message_of(body)
    try:
        read: Any = _packed(packer, v2_grpc.read(signature, message))
    except RequestError as e:  # counts only if it is for this model
        read = vars(e)
    return message.model_name, message.model_version, read


def _packed(packer: RequestPacker, read: InferenceRequest) -> InferenceRequest:
    assert not isinstance(read.inputs, Rows)
    return dataclasses.replace(
        read, inputs=packer.pack(read.inputs, read.weights, read.dense), weights={}, dense={}
    )


READERS: Mapping[str, Callable[..., Any]] = {"v2": _v2, "predict": _predict, "message": _message}
