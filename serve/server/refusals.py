"""What makes refusing a request cheap: what it costs is lost to the requests that are served."""

import asyncio
import re
from typing import Protocol

# Path and fields of what most requests are.
_USUAL = re.compile(rb"POST ([!-~]+) HTTP/1\.1((?:\r\n[0-9A-Za-z_-]+: [ -~]*)+)\r\n\r\n")
_UNUSUAL = (b"transfer-encoding", b"connection", b"expect", b"upgrade")
_USUAL_CONNECTION = b"\r\nconnection: keep-alive\r\n"
#: Bytes of a head of that kind.
USUAL_BYTES = 2048


def usual_request(head: bytes) -> tuple[bytes, int] | None:
    """The path of a request like most, and the bytes of all of it; None of others, which the parser must see.

    Args:
      head: up to and with the empty line.
    """
    usual = _USUAL.fullmatch(head)
    if usual is None:
        return None
    fields = usual[2].lower() + b"\r\n"
    if _USUAL_CONNECTION in fields:  # it says nothing new
        fields = fields.replace(_USUAL_CONNECTION, b"\r\n", 1)
    _, found, length = fields.partition(b"\r\ncontent-length: ")
    length = length.partition(b"\r")[0]
    if (
        not found
        or not length.isdigit()
        or len(length) > 9
        or any(name in fields for name in _UNUSUAL)
        or fields.count(b"\r\ncontent-length") > 1
    ):
        return None
    return usual[1], len(head) + int(length)


def fields_of(head: bytes) -> dict[str, str]:
    """The header fields of a usual request by lower-case name; of several of one name, the first."""
    fields: dict[str, str] = {}
    for line in head.decode("latin-1").split("\r\n")[1:-2]:
        name, _, value = line.partition(": ")
        fields.setdefault(name.lower(), value.lstrip(" "))
    return fields


class Refused(Protocol):
    """A connection whose request is refused."""

    def send_refusal(self) -> None:
        """Sends what is due, if it is."""
        ...


class Turn:
    """The refusals of one turn of the event loop, sent one after the other once all that is there was read.

    Each by itself would wake the client up again, which takes longer than all else of it. What handles the requests that
    were read in this turn comes after them.

    Attributes:
      loop: that ends the turn; None before anything was read.
      refused: what is sent a refusal then. Both are read and appended to as attributes, by code that must be quick.
    """

    __slots__ = ("loop", "refused")

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.refused: list[Refused] = []

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Something was read: to be called before anything is done about it, unless `loop` is the turn's."""
        self.loop = loop
        loop.call_soon(self._end)

    def _end(self) -> None:
        self.loop = None
        if self.refused:
            refused, self.refused = self.refused, []
            for connection in refused:
                connection.send_refusal()
