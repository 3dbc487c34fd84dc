"""Reads the body of a request: bounded in size, also of what it unpacks to, and in time."""

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from .errors import RequestError, bad_request
from .scope import COMPLETE

_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_MAX_MEMBERS = 4096  # each takes time, even an empty one
_PIECE = 1 << 16


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

    gzip may have several members, one after the other.

    Raises:
      RequestError: if it unpacks to more, or is damaged.
    """
    parts: list[bytes] = []
    size, rest = 0, memoryview(body)
    for _ in range(_MAX_MEMBERS if "gzip" in encoding else 1):
        stream = zlib.decompressobj(_WINDOW[encoding])
        while not stream.eof:
            if not rest:
                raise bad_request(f"the body is not {encoding}: it ends too early.")
            piece = rest[:_PIECE]  # what follows a member is copied, so that it must not be all that follows
            try:
                parts.append(stream.decompress(piece, max_bytes + 1 - size))
            except zlib.error as e:
                raise bad_request(f"the body is not {encoding}: {e}.") from None
            size += len(parts[-1])
            if size > max_bytes:
                raise _too_large(max_bytes)
            rest = rest[len(piece) - len(stream.unused_data) :]
        if not rest:
            return b"".join(parts)
    raise bad_request(f"the body is not {encoding}: it goes on after its end, or is of too many parts.")


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the body must be at most {max_bytes} bytes, also once decompressed.")
