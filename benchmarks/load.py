"""Load: keeps so many requests under way and times each, over HTTP/1.1 or gRPC."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

Send = Callable[[int], Awaitable[int]]


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
        self._received, self._end = b"", 0
        self.body = b""

    async def __aenter__(self) -> "Connection":
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[int] = self._loop.create_future()
        self._transport, _ = await self._loop.create_connection(lambda: self, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answer.cancel()
        self._transport.close()

    async def send(self, number: int) -> int:
        """Sends one of the requests; the status of its answer."""
        if self._transport.is_closing():
            raise ConnectionResetError("the server has closed the connection.")
        self._answer = self._loop.create_future()
        self._transport.write(self._requests[number % len(self._requests)])
        return await self._answer

    def data_received(self, data: bytes) -> None:
        """Ends `send` once all of the answer is there."""
        self._received += data
        if not self._end:
            start = self._received.find(b"\r\n\r\n") + 4
            if start < 4:
                return
            at = self._received.lower().index(b"\r\ncontent-length:", 0, start) + 17
            self._start = start
            self._end = start + int(self._received[at : self._received.index(b"\r\n", at)])
        if len(self._received) >= self._end:
            status, self.body = int(self._received[9:12]), self._received[self._start : self._end]
            self._received, self._end = b"", 0
            self._answer.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        """There is no answer any more."""
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server has closed the connection."))


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
