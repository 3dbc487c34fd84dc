"""Reads the body of a request: bounded in size, also of what it unpacks to, and in time."""

import asyncio
import zlib
from time import monotonic

from starlette.requests import ClientDisconnect, Request

from .errors import RequestError, bad_request
from .large import Hold
from .scope import COMPLETE
from .service import Service

_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_MAX_MEMBERS = 4096  # each takes time, even an empty one
_PIECE = 1 << 16
_QUICK = 1 << 12  # compressed bytes: at most 4 MB, unpacked in some milliseconds


async def read_body(request: Request, service: Service, hold: Hold) -> bytes:
    """The body, decompressed.

    Args:
      request: of starlette, admitted.
      service: its configuration says how large a body may be, compressed and not, and in how many seconds it must arrive.
      hold: of the request.

    Raises:
      RequestError: if it is too large, too slow, or not compressed as it says, or there is no room for it.
      ClientDisconnect: if the client is gone.
    """
    headers, config = request.headers, service.config
    max_bytes = config.max_body_bytes
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOW:
        raise RequestError(415, f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}.")
    length = headers.get("content-length")
    if length is not None and length.isdecimal():
        size = length_of(length)
        if size > max_bytes:
            raise _too_large(max_bytes)
        hold.expect(size)
    if COMPLETE in request.scope:
        body = await _receive(request, max_bytes, hold)
    else:
        begin = monotonic()
        try:
            async with asyncio.timeout(config.body_timeout) as until:
                with service.arriving(until):
                    body = await _receive(request, max_bytes, hold)
        except TimeoutError:
            waited = min(monotonic() - begin, config.body_timeout)
            raise RequestError(408, f"the body did not arrive in {waited:.3g} s.") from None
    if encoding == "identity":
        return body
    if len(body) < _QUICK:
        unpacked = decompress(body, encoding, max_bytes)
    else:
        deadline = monotonic() + config.default_timeout
        unpacked = await service.large.run(deadline, decompress, body, encoding, max_bytes)
    hold.grow(len(body) + len(unpacked))
    return unpacked


def length_of(header: str) -> int:
    """The bytes that a Content-Length of digits says; 20 digits of a longer one, which is beyond any limit, too.

    Zeros may come before them, as many as there is room for: more digits than Python makes a number of.
    """
    return int("0" + header.lstrip("0")[:20])


async def _receive(request: Request, max_bytes: int, hold: Hold) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        hold.grow(size)
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
