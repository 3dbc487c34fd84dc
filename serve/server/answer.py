"""Answer: what a request is answered with, before it is anything of ASGI."""

import dataclasses
import json

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from .errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An answer over HTTP.

    Attributes:
      status: of HTTP; 499 if nobody waits for it any more.
      body: all of it.
      media_type: of the body.
      fields: further header fields.
    """

    status: int
    body: bytes
    media_type: str = "application/json"
    fields: tuple[tuple[str, str], ...] = ()

    def response(self) -> Response:
        """For ASGI."""
        return Response(self.body, self.status, dict(self.fields), self.media_type)

    def message(self, fields: list[tuple[bytes, bytes]], closes: bool) -> bytes:
        """All bytes of it, as uvicorn writes those of `response`.

        Args:
          fields: header fields that come first.
          closes: whether the connection ends with it.
        """
        lines = [b"%b: %b\r\n" % field for field in fields]
        lines += [f"{name.lower()}: {value}\r\n".encode("latin-1") for name, value in self.fields]
        lines.append(
            b"content-length: %d\r\ncontent-type: %b\r\n" % (len(self.body), self.media_type.encode("latin-1"))
        )
        if closes and (b"connection", b"close") not in fields:
            lines.append(b"connection: close\r\n")
        return b"".join([STATUS_LINE[self.status], *lines, b"\r\n", self.body])


def error_answer(error: RequestError) -> Answer:
    """What a request that is not served is answered with."""
    fields = () if error.retry_after is None else (("Retry-After", str(error.retry_after)),)
    return Answer(error.status, json.dumps({"error": error.message}).encode(), fields=fields)
