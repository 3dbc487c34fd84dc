"""The binary tensor extension of v2 over REST: JSON, and after it the bytes of tensors.

References:
  https://github.com/triton-inference-server/server, "Binary Tensor Data Extension".
"""

from typing import Any

from .errors import bad_request
from .v2_json import read_object

HEADER = "inference-header-content-length"


def split(body: bytes, header: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON object of a body and the bytes that follow it.

    Args:
      body: of the request.
      header: the length of the JSON, as Inference-Header-Content-Length says; None if all is JSON.

    Raises:
      RequestError: if there is no such part, or it is no JSON object.
    """
    view = memoryview(body)
    if header is None:
        return read_object(view), view[:0]
    if not header.isascii() or not header.isdecimal() or len(header) > 12 or int(header) > len(body):
        raise bad_request(
            f"Inference-Header-Content-Length must be at most the {len(body)} bytes of the body, got {header[:40]!r}."
        )
    return read_object(view[: int(header)]), view[int(header) :]
