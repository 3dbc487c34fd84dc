"""Uvicorn's HTTP protocol for clients that send requests without waiting for answers, and little memory for them."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .answer import error_answer
from .body import length_of
from .errors import RequestError

#: Of the URL and all headers of a request, or the trailers of its body.
MAX_HEAD_BYTES = 1 << 16
# Bytes that are parsed at once unless they are of one body: requests in them may be hundreds, and take much more memory.
_PIECE = 1 << 14
_CONTINUE = b"HTTP/1.1 100 "
_ASK_SECONDS = 0.02


_TOO_LARGE = error_answer(
    RequestError(431, f"the URL and headers must be at most {MAX_HEAD_BYTES} bytes.")
).message([], closes=True)
_INVALID = error_answer(RequestError(400, "the request is not HTTP/1.1.")).message([], closes=True)


class _OneWrite:
    """Of a transport, what answers one request: the head and the first part of the body leave together.

    Apart, each would be a call of the kernel, and wake the client up. What comes after the client left is dropped.

    Args:
      transport: of the connection.
      has_body: whether a body follows the head; it may be empty.
      close: ends the connection.
    """

    def __init__(self, transport: Any, has_body: bool, close: Callable[[], None]):
        self._transport, self._head = transport, b"" if has_body else None
        self.is_closing, self.close = transport.is_closing, close

    def write(self, data: bytes) -> None:
        if self._head == b"" and not data.startswith(_CONTINUE):
            self._head = data
        elif not self.is_closing():
            if self._head:
                data, self._head = self._head + data, None
            self._transport.write(data)


class _Flow(FlowControl):
    """Uvicorn reads on after each answer and before each part of a body: not so while requests wait."""

    stopped = False

    def resume_reading(self) -> None:
        if not self.stopped:
            super().resume_reading()


class PipeliningProtocol(HttpToolsProtocol):
    """Answers the requests of a connection one after the other, and keeps little of what comes meanwhile.

    While a request waits for the answer before it, nothing more is parsed or read. A head of more than `MAX_HEAD_BYTES`
    is refused. What is no HTTP, and the end of what the client sends, end the connection, once all that was sent before
    is answered.

    Upgrades to other protocols, which Java's client asks for in every request, are ignored, as HTTP lets servers do.
    """

    parser: Any  # uvicorn's, which makes the first one
    flow: Any
    cycle: Any  # of the request that was read last, until it is answered; None for none
    scope: Any
    headers: Any
    #: The request that is being answered, or was last.
    _started: Any = None
    #: What was read, and waits for an answer to be parsed.
    _unparsed: memoryview | None = None
    #: What ends the connection, once the answers that are due are sent; nothing is read any more.
    _last: bytes | None = None
    #: Bytes since the last ones of a body: of a head, or of what is between the parts of a body and after them.
    _outside = 0
    #: Bytes that were read of the body that is being read; -1 between bodies.
    _body_read = -1

    def connection_made(self, transport: Any) -> None:
        """Nothing waits."""
        super().connection_made(transport)
        self.flow = _Flow(transport)

    def data_received(self, data: bytes) -> None:
        """Parses it, or keeps it until it may be parsed."""
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._end(_INVALID)

    def _feed(self, rest: memoryview) -> None:
        while rest and not self.pipeline:
            # No more of a head is ever parsed, and kept, than it may have.
            size = MAX_HEAD_BYTES - self._outside
            if len(rest) > _PIECE:
                size = max(min(size, _PIECE), self._body_left())
            piece = rest[:size]
            if not piece:
                self._end(_TOO_LARGE)
                return
            self._outside += len(piece)
            try:
                self.parser.feed_data(piece)
                rest = rest[len(piece) :]
            except httptools.HttpParserUpgrade as e:
                # What would follow in another protocol follows in this one. A parser that has read that it is the last
                # request would take nothing more.
                head = self._head()
                self.parser = httptools.HttpRequestParser(self)
                with contextlib.suppress(AttributeError):  # older versions, as in uvicorn
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
                rest = rest[e.args[0] :]
        if self.pipeline:
            self._unparsed = rest
            self._stop_reading()

    def on_header(self, name: bytes, value: bytes) -> None:
        """What comes after the body is no field of the header, which may have been read by then (RFC 9110, 6.5.1)."""
        if self._body_read < 0:
            super().on_header(name, value)

    def _body_left(self) -> int:
        """Bytes that are still to come of the body that is being read, if it said so."""
        if self._body_read < 0:
            return 0
        return length_of(dict(self.headers).get(b"content-length", b"0").decode("latin-1")) - self._body_read

    def _head(self) -> bytes:
        """That of the request, without the header that asks for another protocol."""
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([first, *fields, b"", b""])

    def _stop_reading(self) -> None:
        self.flow.stopped = True
        self.flow.pause_reading()

    @property
    def _due(self) -> bool:
        """Whether a request is being answered."""
        return self._started is not None and not self._started.response_complete

    def _end(self, answer: bytes) -> None:
        """Ends the connection with `answer`, once all that is due is answered."""
        cycle, self._unparsed = self.cycle, None
        if self._started is not None and self._started.response_complete and not self._started.keep_alive:
            answer = b""  # the last one was given
        if cycle is not None and cycle.more_body and not cycle.response_complete:  # its body ends here
            if cycle is self._started:
                self._close_with(b"" if cycle.response_started else answer)
                return
            self.pipeline.popleft()
        if self._due:
            self._last = answer
            self._stop_reading()
        else:
            self._close_with(answer)

    def _close_with(self, answer: bytes) -> None:
        if self.transport.is_closing():
            return
        if answer:
            self.transport.write(answer)
        self.transport.close()

    def _close(self) -> None:
        """After an answer not before all of the request came: what is unread would reset the connection."""
        cycle = self._started
        if cycle is None or not cycle.response_complete or not cycle.more_body:
            self.transport.close()

    def on_message_complete(self) -> None:
        """The request is there; one that was the last, and is answered already, ends the connection."""
        super().on_message_complete()
        if self.cycle.response_complete and not self.cycle.keep_alive:
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays, as answers are due: the client may still read."""
        self._end(b"")
        if self._last is None:
            return False
        # It is told from one that left by what is sent to it: that is refused by the system of one that left.
        if not self._started.response_started and self._started.scope["http_version"] == "1.1":
            self.transport.write(_CONTINUE + b"Continue\r\n\r\n")
            self.loop.call_later(_ASK_SECONDS, self._ask)
        return True

    def _ask(self) -> None:
        """Ends the connection if the client left."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(_ASK_SECONDS, self._ask)

    def on_response_complete(self) -> None:
        """What waits goes on: the next request, or what was read after it.

        Uvicorn's sets a timer for each answer, too, until the next request comes.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        if self._last is not None:
            if not self._due:
                self._close_with(self._last)
        elif self._unparsed is not None and not self.pipeline and not self.transport.is_closing():
            rest, self._unparsed = self._unparsed, None
            self.flow.stopped = False
            if rest:
                self.data_received(bytes(rest))
            self.flow.resume_reading()

    def _forget(self) -> None:
        """Lets go of the request: of one that was answered while the caches hold it, not when the next one comes."""
        self.cycle = self.scope = self.headers = self._started = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for what is due."""
        if self._due:
            self._started.disconnected = True
            self._started.message_event.set()
        self.pipeline.clear()
        self._unparsed = None
        super().connection_lost(exc)
        self._forget()  # it refers to this, and may hold half a body

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._started = cycle
        cycle.transport = _OneWrite(self.transport, cycle.scope["method"] != "HEAD", self._close)
        super()._start_asgi_task(cycle, app)
