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


class Connection:
    """An HTTP connection that sends bodies made beforehand."""

    def __init__(self, port: int, requests: Sequence[bytes]):
        self._port, self._requests = port, requests
        self.body = b""

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def send(self, number: int) -> int:
        """Sends one of the requests; the status of its answer."""
        self._writer.write(self._requests[number % len(self._requests)])
        head = await self._reader.readuntil(b"\r\n\r\n")
        at = head.lower().index(b"\r\ncontent-length:") + 2
        self.body = await self._reader.readexactly(int(head[at + 15 : head.index(b"\r\n", at)]))
        return int(head[9:12])


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
