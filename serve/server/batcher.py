"""Batcher: requests that wait while others run are run together."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from jaxembed.serve.rows import Rows

from .errors import RequestError, expired, overloaded, too_many_rows
from .metrics import Metrics
from .served import ServedModel

# A batch that takes less runs in the event loop: handing it to a thread and back would take about as long.
_INLINE_SECONDS = 0.001
# Fewer requests than this came during a batch, on average: they come one by one.
_ALONE = 0.1
# Of batches that run in the event loop, where nobody can come, so many until one on the thread shows who would.
_LOOKS = 16
_FORGET = 0.02


@dataclasses.dataclass(eq=False, slots=True)
class _Entry:
    model: ServedModel
    rows: Rows
    arrived: float
    timed: float
    deadline: float
    accepted_slowly: bool
    result: asyncio.Future[list[np.ndarray]]
    timer: asyncio.TimerHandle | None = None
    begun: bool = False


class Batcher:
    """Runs one batch at a time; what arrives meanwhile makes up the next one.

    A request that finds nothing running runs at once, with all that the event loop reads together with it, or
    after at most `wait` seconds in which others may join it. Batches that are known to be quick run in the event
    loop, others on a thread; of gRPC, which takes the loop several turns to accept a call, only while hardly any come
    beside another. A request whose deadline passed, or that nobody waits for, is never run. All rows of
    a batch are of one version. Used from one event loop.

    Args:
      max_rows: of a batch; a request of more rows runs alone.
      wait: seconds.
      max_queued_rows: rows that may wait or run; further requests are refused, and for good those of more.
      metrics: told of every batch.
    """

    def __init__(self, max_rows: int, wait: float, max_queued_rows: int, metrics: Metrics):
        self._max_rows, self._wait, self._max_queued = max_rows, wait, max_queued_rows
        self._metrics = metrics
        self._queue: collections.deque[_Entry] = collections.deque()
        self._queued_rows = 0
        self._inline, self._company = 0, 0.0
        # Seconds that batches took of late, by the number of bits of their rows.
        self._seconds: dict[int, float] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxembed-run")
        self._running: asyncio.Future[Any] | None = None
        self._due: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait or run."""
        return self._queued_rows

    def start(self) -> None:
        """Starts to run what is submitted; in the event loop."""
        self._loop = asyncio.get_running_loop()

    async def stop(self) -> None:
        """Refuses what waits and ends."""
        self._loop = None
        if self._due is not None:
            self._due.cancel()
        for entry in self._queue:
            self._fail([entry], RequestError(503, "the server is stopping.", retry_after=1))
        self._queue.clear()
        if self._running is not None:
            await asyncio.wait([self._running])
        self._thread.shutdown()

    async def submit(
        self, model: ServedModel, rows: Rows, deadline: float, accepted_slowly: bool = False
    ) -> list[np.ndarray]:
        """The outputs of some rows, in the order of the model's signature.

        Args:
          model: that packed them.
          rows: of a request.
          deadline: in the time of `time.monotonic`; that of the event loop may be coarser.
          accepted_slowly: of a kind of which each takes the event loop several turns until it is here.

        Raises:
          RequestError: if there is no room, or never is, or the deadline passed first.
        """
        if len(rows) > self._max_queued:
            raise too_many_rows(len(rows), self._max_queued)
        if self._queued_rows + len(rows) > self._max_queued:
            raise overloaded(f"{self._queued_rows} rows wait already")
        loop = self._loop
        if loop is None:
            raise RequestError(503, "the server is stopping.", retry_after=1)
        entry = _Entry(
            model, rows, monotonic(), perf_counter(), deadline, accepted_slowly, loop.create_future()
        )
        self._queue.append(entry)
        self._queued_rows += len(rows)
        if self._running is not None or self._wait:
            self._arm(entry)
        if self._running is None:
            self._schedule()
        return await entry.result

    def _schedule(self) -> None:
        """The next batch runs once the event loop has read what is there, or the oldest request has waited."""
        assert self._loop is not None
        if not self._wait or self._queued_rows >= self._max_rows:
            if self._due is None or isinstance(self._due, asyncio.TimerHandle):
                if self._due is not None:
                    self._due.cancel()
                self._due = self._loop.call_soon(self._next)
        elif self._due is None:
            self._due = self._loop.call_later(
                max(self._queue[0].arrived + self._wait - monotonic(), 0), self._next
            )

    def _next(self) -> None:
        self._due = None
        batch = self._next_batch()
        if not batch:
            return
        model, parts = batch[0].model, [entry.rows for entry in batch]
        total = sum(map(len, parts))
        assert self._loop is not None
        if self._runs_inline(batch, total):
            try:
                outcome = self._run(model, parts)
            except Exception as e:
                outcome = e
            self._finish(batch, total, outcome)
            return
        # While the thread runs, deadlines are watched.
        for entry in (*batch, *self._queue):
            if entry.timer is None:
                self._arm(entry)
        self._running = self._loop.run_in_executor(self._thread, self._run, model, parts)
        self._running.add_done_callback(functools.partial(self._ran, batch, total))

    def _runs_inline(self, batch: list[_Entry], total: int) -> bool:
        if self._seconds.get(total.bit_length(), 1.0) >= _INLINE_SECONDS:
            return False
        if not batch[0].accepted_slowly:
            return True
        # While the event loop runs a batch none of these get here, so that each would run alone.
        self._inline += 1
        return self._company < _ALONE and self._inline % _LOOKS != 0

    def _next_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        rows, now, timed = 0, monotonic(), perf_counter()
        while self._queue:
            entry = self._queue[0]
            if entry.result.done() or entry.deadline <= now:
                self._queue.popleft()
                self._queued_rows -= len(entry.rows)
                if not entry.result.done():
                    entry.result.set_exception(expired(begun=False))
                self._disarm(entry)
                continue
            other = batch and (entry.model is not batch[0].model or rows + len(entry.rows) > self._max_rows)
            if other:
                break
            entry.begun = True
            batch.append(self._queue.popleft())
            rows += len(entry.rows)
            self._metrics.stage("queue", timed - entry.timed)
        return batch

    def _run(self, model: ServedModel, parts: list[Rows]) -> tuple[list[np.ndarray], int, float]:
        begin = perf_counter()
        outputs, computed = model.run(parts)
        return outputs, computed, perf_counter() - begin

    def _ran(self, batch: list[_Entry], total: int, running: asyncio.Future[Any]) -> None:
        self._running = None
        self._company += 0.1 * (len(self._queue) - self._company)
        self._finish(batch, total, running.exception() or running.result())

    def _finish(self, batch: list[_Entry], total: int, outcome: Any) -> None:
        self._queued_rows -= total
        if isinstance(outcome, BaseException):
            # Requests were checked before, so this is the model's or the machine's fault, and not theirs.
            self._metrics.log.error("a batch failed", exc_info=outcome)
            message = f"the model failed: {type(outcome).__name__}; see the log of the server."
            self._fail(batch, RequestError(503, message, retry_after=1))
        else:
            outputs, computed, seconds = outcome
            size = total.bit_length()
            known = self._seconds.get(size, seconds)
            # What it takes, and not what it takes when the machine is busy with something else.
            self._seconds[size] = min(seconds, known + _FORGET * (seconds - known))
            self._metrics.batch(seconds, len(batch), total, computed, self._max_rows)
            first = 0
            for entry in batch:
                last = first + len(entry.rows)
                if not entry.result.done():
                    entry.result.set_result([output[first:last] for output in outputs])
                self._disarm(entry)
                first = last
        if self._queue and self._loop is not None:
            self._schedule()

    def _fail(self, batch: list[_Entry], error: RequestError) -> None:
        for entry in batch:
            if not entry.result.done():
                entry.result.set_exception(error)
            self._disarm(entry)

    def _arm(self, entry: _Entry) -> None:
        assert self._loop is not None
        entry.timer = self._loop.call_later(max(entry.deadline - monotonic(), 0), _expire, entry)

    def _disarm(self, entry: _Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None


def _expire(entry: _Entry) -> None:
    if not entry.result.done():
        entry.result.set_exception(expired(entry.begun))
