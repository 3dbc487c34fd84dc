"""GrpcConnection: sends messages made beforehand over HTTP/2, at a small part of what a gRPC client costs.

Clients share the machine with the server: one of grpc.aio costs as much as the server, so that every comparison
of servers would be one of clients.
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import hpack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_HEADER_TABLE_SIZE, _INITIAL_WINDOW, _MAX_FRAME = 1, 4, 5
_LARGEST, _DEFAULT_WINDOW, _DEFAULT_FRAME = 2**31 - 1, 65535, 16384
_RENEWED = 1 << 24
#: Statuses of gRPC as those of HTTP that mean the same; others are 500.
_STATUSES = {0: 200, 8: 429, 14: 503}


class GrpcConnection(asyncio.Protocol):
    """A connection to a gRPC server, on which one call follows another.

    Args:
      port: of the server, on this machine.
      method: "/package.Service/Method".
      messages: of requests, serialized.
    """

    def __init__(self, port: int, method: str, messages: Sequence[bytes]):
        self._port = port
        self._bodies = [b"\0" + len(message).to_bytes(4, "big") + message for message in messages]
        self._head = _request_headers(method, f"127.0.0.1:{port}")
        self._streams = itertools.count(1, 2)
        self._stream, self._answer, self._body = 0, asyncio.Future[int](), b""
        # What may be sent on the connection, and on each stream.
        self._window, self._stream_window, self._initial = _DEFAULT_WINDOW, 0, _DEFAULT_WINDOW
        self._frame_size, self._rest = _DEFAULT_FRAME, memoryview(b"")
        self._received, self._taken, self._parts = b"", 0, list[bytes]()
        self._decoder, self._status = hpack.Decoder(), dict[bytes, int | None]()
        self._decoder.max_allowed_table_size = 0

    async def __aenter__(self) -> "GrpcConnection":
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._transport.close()

    @property
    def body(self) -> bytes:
        """The message of the last answer, serialized."""
        return self._body[5:]

    async def send(self, number: int) -> int:
        """Sends one of the requests; the status of its answer, as HTTP has them."""
        self._stream, self._answer = next(self._streams), asyncio.get_running_loop().create_future()
        self._stream_window, self._rest = self._initial, memoryview(self._bodies[number % len(self._bodies)])
        self._transport.write(_frame(_HEADERS, _END_HEADERS, self._stream, self._head) + self._data())
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduces the client, which takes all that comes and keeps no table of headers."""
        self._transport: Any = transport
        settings = {_HEADER_TABLE_SIZE: 0, _INITIAL_WINDOW: _LARGEST}
        pairs = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings.items())
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, pairs) + _widened(_LARGEST - _DEFAULT_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails the call under way."""
        if not self._answer.done():
            self._answer.set_exception(ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Takes the frames that are here as a whole."""
        data = self._received + data if self._received else data
        at, size = 0, len(data)
        while size - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > size:
                break
            self._take(
                data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : end]
            )
            at = end
        self._received = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if (kind in (_DATA, _HEADERS) and flags & _PADDED) or (kind == _HEADERS and not flags & _END_HEADERS):
            raise RuntimeError(
                "frames with padding, or headers in several frames: no server of this benchmark sends these"
            )
        if kind == _DATA:
            self._parts.append(payload)
            self._taken += len(payload)
            if self._taken > _RENEWED:
                self._transport.write(_widened(self._taken))
                self._taken = 0
        elif kind == _HEADERS:
            if flags & _END_STREAM:
                self._body, self._parts = b"".join(self._parts), []
            status = self._status_of(payload)
            if flags & _END_STREAM:
                self._end(200 if status == 0 else _STATUSES.get(-1 if status is None else status, 500))
        elif kind == _WINDOW:
            size = int.from_bytes(payload, "big")
            if not stream:
                self._window += size
            elif stream == self._stream:
                self._stream_window += size
            self._go_on()
        elif kind == _SETTINGS and not flags & _ACK:
            self._configure(payload)
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _RESET and stream == self._stream:
            self._parts = []
            self._end(500)
        elif kind == _GOAWAY:
            self._transport.close()

    def _end(self, status: int) -> None:
        self._rest = memoryview(b"")
        if not self._answer.done():
            self._answer.set_result(status)

    def _configure(self, payload: bytes) -> None:
        for i in range(0, len(payload), 6):
            key, value = (
                int.from_bytes(payload[i : i + 2], "big"),
                int.from_bytes(payload[i + 2 : i + 6], "big"),
            )
            if key == _INITIAL_WINDOW:
                self._stream_window += value - self._initial
                self._initial = value
            elif key == _MAX_FRAME:
                self._frame_size = value
        self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        self._go_on()

    def _go_on(self) -> None:
        if self._rest:
            self._transport.write(self._data())

    def _data(self) -> bytes:
        """Frames of what is left of the request, as far as the server's windows go."""
        frames = []
        while (
            self._rest
            and (size := min(len(self._rest), self._frame_size, self._window, self._stream_window)) > 0
        ):
            part, self._rest = self._rest[:size], self._rest[size:]
            self._window -= size
            self._stream_window -= size
            frames.append(_frame(_DATA, 0 if self._rest else _END_STREAM, self._stream, part))
        return b"".join(frames)

    def _status_of(self, block: bytes) -> int | None:
        """grpc-status among some headers. Without a table, equal bytes are equal headers."""
        if block not in self._status:
            headers = dict(self._decoder.decode(block))
            status = headers.get("grpc-status")
            self._status[block] = None if status is None else int(status)
        return self._status[block]


def _request_headers(method: str, authority: str) -> bytes:
    fields = {":path": method, ":authority": authority, "te": "trailers", "content-type": "application/grpc"}
    block = b"\x83\x86"  # :method POST, :scheme http
    for name, value in fields.items():  # as they are, to be put in no table
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


def _frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    return b"".join((len(payload).to_bytes(3, "big"), bytes((kind, flags)), stream.to_bytes(4, "big"), payload))


def _widened(size: int) -> bytes:
    return _frame(_WINDOW, 0, 0, size.to_bytes(4, "big"))
