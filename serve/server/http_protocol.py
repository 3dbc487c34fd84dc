"""Uvicorn's HTTP protocol, with a deadline for the headers of every request."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class DeadlineProtocol(HttpToolsProtocol):
    """Closes a connection that does not send the headers of its next request in time.

    Uvicorn does so between requests alone: a connection that sends nothing at first, or its headers byte by
    byte, would stay for good.
    """

    _deadline: asyncio.TimerHandle | None = None
    _seen: Any = None

    def connection_made(self, transport: Any) -> None:
        """The deadline begins."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """The deadline ends with the headers."""
        super().data_received(data)
        if self.cycle is not self._seen:
            self._seen = self.cycle
            self._disarm()
            if self.cycle.response_complete:
                self._arm()

    def on_response_complete(self) -> None:
        """The next deadline begins, unless the next request is here already."""
        super().on_response_complete()
        self._disarm()
        if self.cycle is None or self.cycle.response_complete:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
