"""Load: keeps so many requests under way and times each, over HTTP/1.1 or gRPC."""

import asyncio
import dataclasses
import itertools
import re
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

Send = Callable[[int], Awaitable[int]]
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Load:
    """What came of it.

    Attributes:
      rate: good answers a second.
      p50, p99: seconds, of good answers.
      good: answers.
      refused: with 429 or 503.
      failed: with anything else.
    """

    rate: float
    p50: float
    p99: float
    good: int
    refused: int
    failed: int


class Connection(asyncio.Protocol):
    """An HTTP connection that sends bodies made beforehand, and costs little: clients share the cores of the server."""

    def __init__(self, port: int, requests: Sequence[bytes]):
        self._port, self._requests = port, requests
        self._received, self._start, self._end = b"", 0, 0
        self._answered: Callable[[int | Exception], None] | None = None
        self.body = b""

    async def __aenter__(self) -> "Connection":
        self._loop = asyncio.get_running_loop()
        self._transport, _ = await self._loop.create_connection(lambda: self, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answered = None
        self._transport.close()

    async def send(self, number: int) -> int:
        """Sends one of the requests; the status of its answer."""
        answer: asyncio.Future[int] = self._loop.create_future()

        def answered(status: int | Exception) -> None:
            if answer.done():  # whoever waited was cancelled
                return
            if isinstance(status, int):
                answer.set_result(status)
            else:
                answer.set_exception(status)

        self.start(number, answered)
        return await answer

    def start(self, number: int, answered: Callable[[int | Exception], None]) -> None:
        """Sends one of the requests; `answered` is called with the status of its answer, or why there is none.

        Without the task and the future of `send`, for clients whose processor time counts.
        """
        if self._transport.is_closing():
            raise ConnectionResetError("the server has closed the connection.")
        self._answered = answered
        self._transport.write(self._requests[number % len(self._requests)])

    def data_received(self, data: bytes) -> None:
        """Ends a request once all of the answer is there."""
        received = self._received = self._received + data if self._received else data
        if not self._end:
            start = received.find(b"\r\n\r\n") + 4
            if start < 4:
                return
            found = _LENGTH.search(received, 0, start)
            assert found is not None, received[:start]
            self._start, self._end = start, start + int(found[1])
        if len(received) >= self._end:
            self.body = received[self._start : self._end]
            self._received, self._end = b"", 0
            self._call(int(received[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        """There is no answer any more."""
        self._call(error or ConnectionResetError("the server has closed the connection."))

    def _call(self, status: int | Exception) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(status)


def http_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode() + body


async def run_load(senders: Sequence[Send], seconds: float, pause: float = 0.0) -> Load:
    """Each sender sends one request after another, with `pause` seconds after one that was refused."""
    times: list[float] = []
    counts = {"refused": 0, "failed": 0}
    numbers = itertools.count()
    end = time.perf_counter() + seconds

    async def work(send: Send) -> None:
        while time.perf_counter() < end:
            begin = time.perf_counter()
            status = await send(next(numbers))
            if status == 200:
                times.append(time.perf_counter() - begin)
            else:
                counts["refused" if status in (429, 503) else "failed"] += 1
                if pause:
                    await asyncio.sleep(pause)

    begin = time.perf_counter()
    await asyncio.gather(*map(work, senders))
    taken = time.perf_counter() - begin
    p50, p99 = np.quantile(times, [0.5, 0.99]) if times else (np.inf, np.inf)
    return Load(len(times) / taken, float(p50), float(p99), len(times), **counts)
