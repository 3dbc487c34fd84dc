"""Whole requests: with a head like most, and come (nearly) at once, they are answered without a parser and ASGI's messages."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from .answer import Answer
from .metrics import Refusals
from .pipelining import PipeliningProtocol
from .refusals import fields_of, usual_request
from .service import Room

#: Answers a request: of its header fields, all of its body or None if the client left, a scope, and the room that is
#: kept for it.
Whole = Callable[[Mapping[str, str], bytes | None, dict[str, Any], Room | None], Awaitable[Answer]]
# Heads of usual requests that are remembered.
_REMEMBERED = 512
# Most clients send head and body apart, and the second comes a moment later; the parser waits for others.
_PIECES_SECONDS = 0.005
_FAILED = Answer(500, b"Internal Server Error", "text/plain; charset=utf-8")


class Head(NamedTuple):
    """A usual head.

    Attributes:
      size: bytes of the whole request, of which the head is the first part.
      path: of it.
      refusals: where its refusal is counted.
      answers: what answers it; None leaves that to the parser and ASGI.
      fields: of its header, by lower-case name, those that are asked for.
    """

    size: int
    path: bytes
    refusals: Refusals
    answers: Whole | None
    fields: Mapping[str, str]


class _Nobody:
    """What uvicorn tells of parts of a body, of which there are none to come."""

    def set(self) -> None:
        """Nobody waits."""


class _Cycle:
    """Of a whole request, what uvicorn's cycle is of others."""

    __slots__ = (
        "default_headers",
        "disconnected",
        "keep_alive",
        "response_complete",
        "response_started",
        "scope",
    )
    more_body = False
    message_event = _Nobody()

    def __init__(self, default_headers: list[tuple[bytes, bytes]]):
        self.default_headers = default_headers
        self.scope: dict[str, Any] = {"http_version": "1.1"}
        self.disconnected = self.response_started = self.response_complete = False
        self.keep_alive = True


class WholeProtocol(PipeliningProtocol):
    """Remembers usual heads, and answers whole requests of theirs.

    What it does not know is left to the parser, and to the application: other heads, requests that come slowly, and those
    that come before the last one was answered.
    """

    cycle: Any
    #: Of a path, where its refusals are counted; None of others, which are not answered here.
    refusals: Callable[[bytes], Refusals | None] = staticmethod(lambda path: None)
    #: Of a path, what answers its whole requests; None leaves them to the application.
    answers: Callable[[bytes], Whole | None] = staticmethod(lambda path: None)
    #: Bytes of a body that are answered here.
    most_body: int = 0
    #: Header fields that `answers` asks for.
    fields_read: Sequence[str] = ()
    #: Of a path, the room that is kept for a request until its handling has begun; None if it needs none, or there is none.
    room: Callable[[bytes], Room | None] = staticmethod(lambda path: None)
    heads: ClassVar[dict[bytes, Head]] = {}
    #: What came of a request with a usual head, of which so many bytes are missing; until a timer gives it to the parser.
    _pieces: list[bytes]
    _missing = 0
    _piecing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Nothing has come."""
        super().connection_made(transport)
        self._pieces = []

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        self._take_pieces()
        super().connection_lost(exc)

    def _wait_for_rest(self, data: bytes, size: int) -> None:
        """Keeps the first piece of a request of so many bytes."""
        self._pieces.append(data)
        self._missing = size - len(data)
        self._piecing = self.loop.call_later(_PIECES_SECONDS, self._parse_pieces)

    def _put_together(self, data: bytes) -> bytes | None:
        """The request, if `data` is the rest of it."""
        self._pieces.append(data)
        self._missing -= len(data)
        return None if self._missing > 0 else self._take_pieces()

    def _take_pieces(self) -> bytes:
        if self._piecing is not None:
            self._piecing.cancel()
            self._piecing = None
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)

    def _parse_pieces(self) -> None:
        """Leaves them to the parser."""
        if self._pieces:
            self._parse(self._take_pieces())

    def _parse(self, data: bytes) -> None:
        super().data_received(data)

    def eof_received(self) -> bool:
        """Whether the connection stays; what came last is no whole request."""
        self._parse_pieces()
        return super().eof_received()

    def shutdown(self) -> None:
        """Ends the connection once all that is due was sent; a request whose head came is."""
        self._parse_pieces()
        super().shutdown()

    def _remember(self, head: bytes) -> Head | None:
        usual = usual_request(head)
        refusals = None if usual is None else self.refusals(usual[0])
        if usual is None or refusals is None:
            return None
        path, size = usual
        answers, fields = self.answers(path), fields_of(head)
        if size - len(head) > self.most_body or "content-encoding" in fields:
            answers = None
        read = {name: fields[name] for name in self.fields_read if name in fields}
        if len(self.heads) == _REMEMBERED:
            self.heads.clear()
        self.heads[head] = known = Head(size, path, refusals, answers, read)
        return known

    def _begin_whole(self, answers: Whole, head: Head, body: bytes) -> None:
        """Begins to answer a request, as uvicorn does with `on_headers_complete`."""
        cycle = _Cycle(self.server_state.default_headers)
        self.cycle = self._started = cycle
        room = self.room(head.path)
        task = self.loop.create_task(self._answer_whole(cycle, answers, head, body, room))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _answer_whole(
        self, cycle: _Cycle, answers: Whole, head: Head, body: bytes, room: Room | None
    ) -> None:
        try:
            left = cycle.disconnected
            answer = await answers(head.fields, None if left else body, cycle.scope, room)
        except BaseException as e:  # as uvicorn has it
            self.logger.error("a request failed", exc_info=e)
            answer, cycle.keep_alive = _FAILED, False
        finally:
            if room is not None:
                room.release()
        try:
            await self._send(cycle, answer)
        except BaseException as e:  # there is no memory for all of it, say
            self.logger.error("an answer could not be sent", exc_info=e)
            self.transport.abort()

    async def _send(self, cycle: _Cycle, answer: Answer) -> None:
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        if cycle.disconnected:
            return
        closes = not cycle.keep_alive or (b"connection", b"close") in cycle.default_headers
        cycle.response_started = cycle.response_complete = True
        cycle.keep_alive = not closes
        if not self.transport.is_closing():
            self.transport.write(answer.message(cycle.default_headers, closes))
            if closes:
                self.transport.close()
        self.on_response_complete()
