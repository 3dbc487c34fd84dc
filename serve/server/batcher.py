"""Batcher: requests that wait while others run are run together."""

import asyncio
import collections
import concurrent.futures
import dataclasses
from time import perf_counter

import numpy as np

from jaxembed.serve.rows import Rows

from .errors import RequestError, expired, overloaded
from .metrics import Metrics
from .served import ServedModel


@dataclasses.dataclass(eq=False)
class _Entry:
    model: ServedModel
    rows: Rows
    arrived: float
    timed: float
    deadline: float
    result: asyncio.Future[list[np.ndarray]]


class Batcher:
    """Runs one batch at a time, on a thread; what arrives meanwhile makes up the next one.

    A request that finds nothing running runs at once, or after at most `wait` seconds in which others may
    join it. A request whose deadline passed, or that nobody waits for, is never run. All rows of a batch are
    of one version. Used from one event loop.

    Args:
      max_rows: of a batch; a request of more rows runs alone.
      wait: seconds.
      max_queued_rows: rows that may wait or run; further requests are refused.
      metrics: told of every batch.
    """

    def __init__(self, max_rows: int, wait: float, max_queued_rows: int, metrics: Metrics):
        self._max_rows, self._wait, self._max_queued = max_rows, wait, max_queued_rows
        self._metrics = metrics
        self._queue: collections.deque[_Entry] = collections.deque()
        self._queued_rows = 0
        self._arrival = asyncio.Event()
        self._full = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxembed-run")
        self._task: asyncio.Task[None] | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait or run."""
        return self._queued_rows

    def start(self) -> None:
        """Starts to run what is submitted; in the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Refuses what waits and ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for entry in self._queue:
            if not entry.result.done():
                entry.result.set_exception(RequestError(503, "the server is stopping.", retry_after=1))
        self._queue.clear()
        self._thread.shutdown()

    async def submit(self, model: ServedModel, rows: Rows, deadline: float) -> list[np.ndarray]:
        """The outputs of some rows, in the order of the model's signature.

        Args:
          model: that packed them.
          rows: of a request.
          deadline: in the time of the event loop.

        Raises:
          RequestError: if there is no room, or the deadline passed first.
        """
        if self._queued_rows and self._queued_rows + len(rows) > self._max_queued:
            raise overloaded(f"{self._queued_rows} rows wait already")
        loop = asyncio.get_running_loop()
        entry = _Entry(model, rows, loop.time(), perf_counter(), deadline, loop.create_future())
        self._queue.append(entry)
        self._queued_rows += len(rows)
        self._arrival.set()
        if self._queued_rows >= self._max_rows:
            self._full.set()
        try:
            async with asyncio.timeout_at(deadline):
                return await entry.result
        except TimeoutError:
            raise expired() from None

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            if self._wait:
                await self._gather()
            batch = self._next_batch()
            if batch:
                await self._run(batch)
            if not self._queue:
                self._arrival.clear()
                self._full.clear()

    async def _gather(self) -> None:
        """Waits for more requests, but not beyond what the oldest may wait."""
        until = self._queue[0].arrived + self._wait if self._queue else 0
        if self._queued_rows < self._max_rows:
            self._full.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._full.wait()
            except TimeoutError:
                pass

    def _next_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        rows, now = 0, asyncio.get_running_loop().time()
        while self._queue:
            entry = self._queue[0]
            if entry.result.done() or entry.deadline <= now:
                self._queue.popleft()
                self._queued_rows -= len(entry.rows)
                if not entry.result.done():
                    entry.result.set_exception(expired())
                continue
            other = batch and (entry.model is not batch[0].model or rows + len(entry.rows) > self._max_rows)
            if other:
                break
            batch.append(self._queue.popleft())
            rows += len(entry.rows)
            self._metrics.stage("queue", perf_counter() - entry.timed)
        return batch

    async def _run(self, batch: list[_Entry]) -> None:
        loop, begin = asyncio.get_running_loop(), perf_counter()
        model, parts = batch[0].model, [entry.rows for entry in batch]
        total = sum(map(len, parts))
        try:
            outputs, computed = await loop.run_in_executor(self._thread, model.run, parts)
        except Exception as e:
            self._fail(batch, e)
            return
        finally:
            self._queued_rows -= total
        self._metrics.batch(perf_counter() - begin, len(batch), total, computed, self._max_rows)
        first = 0
        for entry in batch:
            last = first + len(entry.rows)
            if not entry.result.done():
                entry.result.set_result([output[first:last] for output in outputs])
            first = last

    def _fail(self, batch: list[_Entry], error: Exception) -> None:
        """Requests were checked before, so this is the model's or the machine's fault, and not theirs."""
        self._metrics.log.error("a batch failed", exc_info=error)
        for entry in batch:
            if not entry.result.done():
                message = f"the model failed: {type(error).__name__}; see the log of the server."
                entry.result.set_exception(RequestError(503, message, retry_after=1))
