"""The binary tensor extension of v2 over REST: JSON, and after it the bytes of tensors.

References:
  https://github.com/triton-inference-server/server, "Binary Tensor Data Extension".
"""

import functools

from . import v2_json
from .errors import bad_request
from .native_reader import NativeReader
from .request import LARGE, InferenceRequest
from .served import ServedModel
from .signature import Signature
from .v2_json import read_object

_SMALL = 256
HEADER = "inference-header-content-length"


def read(model: ServedModel, body: bytes, header: str | None) -> tuple[InferenceRequest, set[str] | bool]:
    """A request, and which of its outputs are to be answered in binary, as `v2_json.binary_outputs` has it.

    Args:
      model: that it is for.
      body: of the request.
      header: the length of the JSON, as Inference-Header-Content-Length says; None if all is JSON.

    Raises:
      RequestError: if it is none.
    """
    found = None if model.reader is None else read_natively(model.reader, body, header)
    return read_in_python(model.signature, body, header) if found is None else found


def read_natively(
    reader: NativeReader, body: bytes, header: str | None
) -> tuple[InferenceRequest, set[str] | bool] | None:
    """`read` of what the native reader does not leave alone; None for the rest."""
    found = reader.json(body, _json_size(body, header))
    if found is None or len(found[1]) >= LARGE:
        return None
    rows, rest = found
    # What is small is often the same, but for requests with an id.
    read, wanted = _small_rest(rest) if len(rest) < _SMALL else _rest(rest)
    return InferenceRequest(rows, {}, {}, read.outputs, read.id, read.timeout), wanted


def _rest(rest: bytes) -> tuple[InferenceRequest, set[str] | bool]:
    """`read` of a request's members beside its tensors. Not to be changed."""
    data = read_object(rest)
    return v2_json.request(data, {}, {}, {}), v2_json.binary_outputs(data)


_small_rest = functools.lru_cache(1024)(_rest)


def read_in_python(
    signature: Signature, body: bytes, header: str | None
) -> tuple[InferenceRequest, set[str] | bool]:
    """`read` of any request."""
    size, view = _json_size(body, header), memoryview(body)
    data = read_object(view[:size])
    return v2_json.read(signature, data, view[size:]), v2_json.binary_outputs(data)


def _json_size(body: bytes, header: str | None) -> int:
    if header is None:
        return len(body)
    if not header.isascii() or not header.isdecimal() or len(header) > 12 or int(header) > len(body):
        raise bad_request(
            f"Inference-Header-Content-Length must be at most the {len(body)} bytes of the body, got {header[:40]!r}."
        )
    return int(header)
