"""The binary tensor extension of v2 over REST: JSON, and after it the bytes of tensors.

References:
  https://github.com/triton-inference-server/server, "Binary Tensor Data Extension".
"""

from typing import Any

from . import v2_json
from .errors import bad_request
from .request import InferenceRequest
from .served import ServedModel
from .v2_json import read_object

_SMALL = 256
HEADER = "inference-header-content-length"


def read(model: ServedModel, body: bytes, header: str | None) -> tuple[dict[str, Any], InferenceRequest]:
    """A request, and its JSON object, which may lack the inputs.

    Args:
      model: that it is for.
      body: of the request.
      header: the length of the JSON, as Inference-Header-Content-Length says; None if all is JSON.

    Raises:
      RequestError: if it is none.
    """
    size = _json_size(body, header)
    found = None if model.reader is None else model.reader.json(body, size)
    if found is not None:
        data = v2_json.read_small(found[1]) if len(found[1]) < _SMALL else read_object(found[1])
        return data, v2_json.request(data, found[0], {}, {})
    view = memoryview(body)
    data = read_object(view[:size])
    return data, v2_json.read(model.signature, data, view[size:])


def _json_size(body: bytes, header: str | None) -> int:
    if header is None:
        return len(body)
    if not header.isascii() or not header.isdecimal() or len(header) > 12 or int(header) > len(body):
        raise bad_request(
            f"Inference-Header-Content-Length must be at most the {len(body)} bytes of the body, got {header[:40]!r}."
        )
    return int(header)
