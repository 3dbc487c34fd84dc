"""The HTTP protocol, with a deadline for the headers of every request, and a short way to refuse one."""

import asyncio
import contextlib
import fcntl
import sys
import termios
from collections.abc import Callable
from typing import Any, ClassVar

from .answer import error_answer
from .app import App
from .errors import overloaded
from .inference import FIELDS
from .metrics import Refusals
from .refusals import USUAL_BYTES, Turn
from .request import LARGE
from .scope import COMPLETE, ROOM, TASK
from .service import Room, Service
from .whole import Head, WholeProtocol

# Bytes of a body until which its reader is not woken up, nor the client held back, before all of it is there.
_GATHERED, _MOST_PARTS = 1 << 19, 64


def make_protocol(service: Service, app: App) -> type["DeadlineProtocol"]:
    """The protocol of a server: what has no room in `service` is refused at its headers.

    Args:
      service: behind it.
      app: that answers requests.
    """
    served = app.served

    class Protocol(DeadlineProtocol):
        full = staticmethod(service.refuses)
        refusals = staticmethod(
            {path: service.metrics.refusals(protocol) for path, protocol in served.items()}.get
        )
        # What is not refused at its headers for want of room, such as the last of its connection, is by the application.
        room = staticmethod(lambda path: service.room() if path in served and not service.full else None)
        answers = staticmethod(app.whole.get)
        most_body = min(service.config.max_body_bytes, LARGE - 1)
        fields_read = FIELDS
        heads: ClassVar[dict[bytes, Head]] = {}
        turn = Turn()
        leaves = staticmethod(lambda: service.leaving or service.versions.current is None)

    return Protocol


_FULL = error_answer(overloaded("as many requests as may are served or wait already"))


def _unsent(transport: Any) -> int:
    """Bytes that the other side has not taken yet."""
    unsent = transport.get_write_buffer_size()
    with contextlib.suppress(OSError):  # the kernel asks for more once a third of what it holds is gone
        held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        unsent += int.from_bytes(held, sys.byteorder)
    return unsent


def _releasing(app: Any, room: Room) -> Any:
    """`app`, which may end without having admitted the request."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        finally:
            room.release()

    return call


class DeadlineProtocol(WholeProtocol):
    """Closes a connection that does not send the headers of its next request, or read its answers, in time.

    Uvicorn's own deadline, which is not used, is between requests alone: a connection that sends nothing at first, or its
    headers byte by byte, would stay for good.

    A server that has no room refuses requests as soon as their headers are there, with an answer made beforehand
    and nothing else: what refusing costs is lost to the requests that are served.
    """

    #: Whether requests are refused.
    full: Callable[[], bool] = staticmethod(lambda: False)
    #: When refusals are sent.
    turn: Turn = Turn()
    #: Whether clients should go elsewhere with what they send next.
    leaves: Callable[[], bool] = staticmethod(lambda: False)

    _REFUSAL = _FULL.message([], closes=False)
    _deadline: float | None = None
    #: Looks at the deadline when it may be over: to set one costs nothing that way, and it is set several times a request.
    _timer: asyncio.TimerHandle | None = None
    _watching: asyncio.TimerHandle | None = None
    _seen: Any = None
    _skips = False
    _between = True
    #: Where the refusal that is due is counted; None if none is.
    _refusal_due: Refusals | None = None
    #: Of the body that is being read, what its reader does not have yet.
    _parts: list[bytes]
    _held = 0

    def connection_made(self, transport: Any) -> None:
        """The deadline begins."""
        super().connection_made(transport)
        self._parts = []
        self._arm()

    def data_received(self, data: bytes) -> None:
        """The deadline ends with the headers."""
        turn = self.turn
        if turn.loop is not self.loop:
            turn.begin(self.loop)
        if self._pieces:
            put = self._put_together(data)
            if put is None:
                return
            data = put
        if self._between and self._take_whole(data, turn):
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        if self._refusal_due is not None:
            self.send_refusal()
        super()._parse(data)
        if self.cycle is not self._seen:
            self._seen = self.cycle
            self._disarm()
            if self.cycle.response_complete:
                self._arm()

    def _take_whole(self, data: bytes, turn: Turn) -> bool:
        """Refuses a request like most, or begins to answer it, if it is all of `data`, or waits a moment for its rest.

        Clients send the same head again and again, so that it is hardly ever read at all. This code runs with cold
        caches: what it does not touch is saved twice.
        """
        refuses = turn.refused or self.full()  # once one is refused, so are others of the turn
        head = data[: data.find(b"\r\n\r\n", 0, USUAL_BYTES) + 4]
        found = self.heads.get(head) or self._remember(head)
        if found is None or found.size < len(data):
            return False
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            return False
        if found.size > len(data):
            # What is refused is as soon as its head is there, and what is to be served by a server that ends is admitted then.
            if (
                refuses
                or self.leaves()
                or found.answers is None
                or self._last is not None
                or self.transport.is_closing()
            ):
                return False
            self._disarm()
            self._wait_for_rest(data, found.size)
            return True
        self._outside = 0
        if not refuses:
            return self._answers_whole(found, data, len(head))
        if self._refusal_due is not None:  # of the request before, should it be that quick
            self.send_refusal()
        self._refusal_due = found.refusals
        turn.refused.append(self)
        return True

    def _answers_whole(self, found: Head, data: bytes, head: int) -> bool:
        if found.answers is None or self._last is not None or self.transport.is_closing():
            return False
        self.send_refusal()
        self._disarm()
        self._begin_whole(found.answers, found, data[head:])
        if self.leaves():
            self.leave()
        return True

    def send_refusal(self) -> None:
        """Sends one, if it is due, and counts it."""
        refusals, self._refusal_due = self._refusal_due, None
        if refusals is None:
            return
        if self.flow.write_paused:  # it sends requests and reads no answers
            self.transport.close()
        elif not self.transport.is_closing():
            self.transport.write(self._REFUSAL)
            refusals.count += 1
            self._arm()

    def eof_received(self) -> bool:
        """Whether the connection stays; the last request that came may have been refused."""
        self.send_refusal()
        return super().eof_received()

    def shutdown(self) -> None:
        """Ends the connection once all that is due was sent."""
        self.send_refusal()
        super().shutdown()

    def on_message_begin(self) -> None:
        """What is between requests ends."""
        self._between = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request is refused, or its handling begins."""
        self._outside = self._body_read = 0
        if self.transport.is_closing():  # it follows the last one
            self._skips = True
            return
        parser = self.parser
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy.")
            return  # its head comes again
        if (self.cycle is None or self.cycle.response_complete) and parser.get_method() == b"POST":
            refusals = self.refusals(self.url) if self.full() else None
            # What is answered with HTTP/1.0 is the last of its connection, whatever it asks for.
            if refusals is not None and parser.should_keep_alive() and parser.get_http_version() == "1.1":
                self._skips, self._refusal_due = True, refusals
                self.send_refusal()
                return
        self._parts, self._held = [], 0
        super().on_headers_complete()
        if self.leaves():
            self.leave()

    def leave(self) -> None:
        """The answer that is due, if there is one, says that it is the last of its connection; what waits is admitted."""
        self._parse_pieces()
        cycle = self.cycle
        if cycle is not None and not cycle.response_started and cycle.keep_alive:
            cycle.default_headers = [*cycle.default_headers, (b"connection", b"close")]

    def on_body(self, body: bytes) -> None:
        """That of a refused request is dropped; of others all is handed on at once, unless it is large."""
        self._outside = 0
        self._body_read += len(body)
        if self._skips or self.cycle.response_complete:
            return
        self._parts.append(body)
        self._held += len(body)
        if self._held > _GATHERED or len(self._parts) == _MOST_PARTS:
            super().on_body(b"".join(self._parts))
            self._parts, self._held = [], 0

    def on_message_complete(self) -> None:
        """The next request may begin."""
        self._outside, self._body_read = 0, -1
        self._between = True
        if self.parser.should_upgrade():
            return
        cycle, parts = self.cycle, self._parts
        self._parts, self._held = [], 0
        if self._skips:
            self._skips = False
            self._arm()
        else:
            if cycle is not None and not cycle.response_complete:
                cycle.scope[COMPLETE] = True
                parts = [cycle.body, *parts] if cycle.body else parts
                cycle.body = parts[0] if len(parts) == 1 else b"".join(parts)
            super().on_message_complete()
        if cycle is None or cycle.response_complete:
            self._seen = None
            self._forget()
        if not self.transport.is_closing():
            # Of a body that is there nobody asks for more, which is what uvicorn waits for; and who reads nothing does not see
            # that the client leaves.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """The next deadline begins, unless the next request is here already."""
        super().on_response_complete()
        self._disarm()
        if self.cycle is None or self.cycle.response_complete:
            self._arm()
            if self._between:
                self._seen = None
                self._forget()
        if self.transport.get_write_buffer_size():
            self._watch()

    def pause_writing(self) -> None:
        """It takes the client a while to read; it must not take it for ever."""
        super().pause_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for, and nobody."""
        task = None if self._started is None else self._started.scope.pop(TASK, None)
        if task is not None:
            task.cancel()
        for timer in (self._timer, self._watching):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._seen, self._parts = None, []

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        # Others whose headers come before it is admitted are refused at theirs.
        room = self.room(cycle.scope["raw_path"]) if cycle.scope["method"] == "POST" else None
        if room is not None:
            cycle.scope[ROOM] = room
            app = _releasing(app, room)
        super()._start_asgi_task(cycle, app)

    def _arm(self) -> None:
        self._deadline = self.loop.time() + self.timeout_keep_alive
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._late)

    def _disarm(self) -> None:
        self._deadline = None

    def _watch(self) -> None:
        if self._watching is None:
            self._look(None)

    def _look(self, before: int | None) -> None:
        """Ends a connection of which nothing was read since the last look; what is unsent would keep it for good."""
        self._watching = None
        if not self.transport.get_write_buffer_size():
            return
        unsent = _unsent(self.transport)
        if unsent == before:
            self.transport.abort()
        else:
            self._watching = self.loop.call_later(self.timeout_keep_alive, self._look, unsent)

    def _late(self) -> None:
        self.send_refusal()  # timers come before the end of the turn
        self._timer = None
        if self._deadline is None:
            return
        if self._deadline > self.loop.time():
            self._timer = self.loop.call_at(self._deadline, self._late)
        elif self.transport.get_write_buffer_size():  # it is not idle: it reads, or is ended for not doing so
            self._watch()
            self._arm()
        elif not self.transport.is_closing():
            self.transport.close()
