"""Reads the body of a request: bounded in size, also of what it unpacks to, and in time."""

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from .errors import RequestError, bad_request
from .scope import COMPLETE

_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}


async def read_body(request: Request, max_bytes: int, timeout: float) -> bytes:
    """The body, decompressed.

    Args:
      request: of starlette.
      max_bytes: of the body, compressed and not.
      timeout: seconds in which all of it must arrive.

    Raises:
      RequestError: if it is too large, too slow, or not compressed as it says.
      ClientDisconnect: if the client is gone.
    """
    headers = request.headers
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOW:
        raise RequestError(415, f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}.")
    length = headers.get("content-length")
    if length is not None and length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    if COMPLETE in request.scope:
        body = await _receive(request, max_bytes)
    else:
        try:
            async with asyncio.timeout(timeout):
                body = await _receive(request, max_bytes)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive in {timeout:g} s.") from None
    return body if encoding == "identity" else decompress(body, encoding, max_bytes)


async def _receive(request: Request, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """What `body` unpacks to; no more than `max_bytes` are ever unpacked.

    Raises:
      RequestError: if it unpacks to more, or is damaged.
    """
    stream = zlib.decompressobj(_WINDOW[encoding])
    try:
        data = stream.decompress(body, max_bytes + 1)
    except zlib.error as e:
        raise bad_request(f"the body is not {encoding}: {e}.") from None
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    if not stream.eof or stream.unused_data:
        raise bad_request(f"the body is not {encoding}: it ends too early or goes on after its end.")
    return data


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the body must be at most {max_bytes} bytes, also once decompressed.")
