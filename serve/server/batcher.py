"""Batcher: requests that wait while others run are run together."""

import asyncio
import collections
import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter

import numpy as np

from jaxembed.serve.rows import Rows

from .errors import RequestError, expired, overloaded, too_many_rows, unavailable
from .metrics import Metrics
from .served import ServedModel

# A batch that takes less runs in the event loop: handing it to a thread and back would take about as long.
_INLINE_SECONDS = 0.001
# So does one that takes less than reading and answering its requests, at so much each: a thread would wait for the
# interpreter, which these keep, and the event loop for the batch. But it must not be known to keep the loop for longer.
_EACH_SECONDS, _LONGEST_INLINE = 0.0002, 0.003
# Fewer requests than this came during a batch, on average: they come one by one.
_ALONE = 0.1
# Of batches that run in the event loop, where nobody can come, so many until one on the thread shows who would.
_LOOKS = 16
_FORGET = 0.02
_RECENT = 0.1
# After a thread could not be started, while there are others.
_RETRY_SECONDS = 1.0


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
    done: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a batch: of the entries that ran, outputs and rows computed; or an error."""

    entries: Sequence[_Entry]
    outputs: Sequence[np.ndarray]
    computed: int
    begin: float
    seconds: float
    error: BaseException | None = None


class Batcher:
    """Runs a few batches at a time; what arrives while none may start makes up the next one.

    A request that finds a thread idle runs at once, with all that the event loop reads together with it, or
    after at most `wait` seconds in which others may join it. Batches that are known to be quick run in the event
    loop, others on a thread; of gRPC, which takes the loop several turns to accept a call, only while hardly any come
    beside another. What waits is divided among the threads that are idle, unless it is quick as a whole; while none is,
    one large batch is made ready, so that a thread need not wait for the event loop. A request whose deadline passed,
    or that nobody waits for, is never run. All rows of a batch are of one version. Used from one event loop.

    Args:
      max_rows: of a batch; a request of half as many rows or more runs alone, as company would only delay it.
      wait: seconds.
      max_queued_rows: rows that may wait or run; further requests are refused, and for good those of more.
      metrics: told of every batch.
      at_once: batches that may run at a time, each on a thread.
    """

    def __init__(self, max_rows: int, wait: float, max_queued_rows: int, metrics: Metrics, at_once: int = 1):
        self._max_rows, self._wait, self._max_queued = max_rows, wait, max_queued_rows
        self._metrics = metrics
        self._queue: collections.OrderedDict[_Entry, None] = collections.OrderedDict()
        #: Batches for the threads; None ends one.
        self._ready: queue.SimpleQueue[list[_Entry] | None] = queue.SimpleQueue()
        self._queued_rows = self._waiting_rows = 0
        # Requests that came since a batch ended, while others ran; and how many did of late.
        self._beside, self._company = 0, 0.0
        self._inline = 0
        #: Requests whose outputs are there, while those who wait for them have not been woken up yet.
        self.done: int = 0
        # Seconds that batches took of late, by the number of bits of their rows.
        self._seconds: dict[int, float] = {}
        # That took them. It may be gone by the next batch, with its tables.
        self._model: Callable[[], ServedModel | None] = _no_model
        self._rows_each = 1.0  # of requests, on average of late
        self.at_once: int = at_once
        self._threads: list[threading.Thread] = []
        self._retry_at = 0.0
        #: Batches that run on threads, or are ready to.
        self._under_way = 0
        self._stopped: asyncio.Future[None] | None = None
        # A quick batch that runs on a thread, so that others come beside it: none starts, it would be a small one.
        self._gathering: list[_Entry] | None = None
        self._due: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait or run."""
        return self._queued_rows

    @property
    def seconds_alone(self) -> float:
        """What a batch of one request takes, of as many rows as requests have of late; 0 before any ran."""
        size = round(self._rows_each).bit_length()
        known = min((bits for bits in self._seconds if bits >= size), default=max(self._seconds, default=None))
        return 0.0 if known is None else self._seconds[known]

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
        if self._under_way:
            self._stopped = asyncio.get_running_loop().create_future()
            await self._stopped
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

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
        self._queue[entry] = None
        self._queued_rows += len(rows)
        self._waiting_rows += len(rows)
        self._beside += self._under_way > 0
        if self._under_way or self._wait:
            self._arm(entry)
        if self._has_room:
            self._schedule()
        try:
            return await entry.result
        finally:
            self.done -= entry.done
            if entry in self._queue:  # nobody waits for it any more
                self._drop(entry)

    @property
    def _first(self) -> _Entry:
        """The oldest that waits."""
        return next(iter(self._queue))

    def _drop(self, entry: _Entry) -> None:
        """Takes it off the queue, and gives its room back."""
        del self._queue[entry]
        self._queued_rows -= len(entry.rows)
        self._waiting_rows -= len(entry.rows)
        self._disarm(entry)

    @property
    def _has_room(self) -> bool:
        if self._gathering is not None:
            return False
        large = 2 * self._waiting_rows >= self._max_rows
        return self._under_way < self.at_once + large

    def _schedule(self) -> None:
        """The next batch runs once the event loop has read what is there, or the oldest request has waited."""
        assert self._loop is not None
        if not self._wait or self._waiting_rows >= self._max_rows:
            if self._due is None or hasattr(self._due, "when"):  # a timer of any loop's
                if self._due is not None:
                    self._due.cancel()
                self._due = self._loop.call_soon(self._wait_a_turn)
        elif self._due is None:
            self._due = self._loop.call_later(
                max(self._first.arrived + self._wait - monotonic(), 0), self._next
            )

    def _wait_a_turn(self) -> None:
        """What came while the last batch was run or answered is read in this turn of the loop, and a request in the next."""
        assert self._loop is not None
        self._due = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._due = None
        batch = self._next_batch() if self._has_room else []
        if not batch:
            return
        quick = self._is_quick(batch[0], len(batch), sum(len(entry.rows) for entry in batch))
        if quick and self._runs_inline(batch):
            self._finish(batch, self._run(batch))
            return
        # While threads run, deadlines are watched.
        for entry in (*batch, *self._queue):
            if entry.timer is None:
                self._arm(entry)
        if len(self._threads) < self.at_once and len(self._threads) <= self._under_way:
            self._start_thread()
        if not self._threads:
            self._queued_rows -= sum(len(entry.rows) for entry in batch)
            self._fail(batch, unavailable("it has no thread to run them, and can start none"))
            if self._queue:
                self._schedule()
            return
        self._under_way += 1
        if quick:
            self._gathering = batch
        self._ready.put(batch)
        if self._queue and self._has_room:
            self._schedule()

    def _start_thread(self) -> None:
        quiet = monotonic() < self._retry_at
        if self._threads and quiet:
            return
        name = f"jaxembed-run-{len(self._threads)}"
        thread = threading.Thread(target=self._work, args=(self._loop,), name=name, daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as e:  # those that there are run its batches
            if not quiet:
                self._retry_at = monotonic() + _RETRY_SECONDS
                reason = str(e) or type(e).__name__
                self._metrics.log.error(
                    "a thread cannot be started", extra={"reason": reason, "threads": len(self._threads)}
                )
            return
        self._threads.append(thread)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (batch := self._ready.get()) is not None:
            outcome = self._run(batch)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(self._ran, batch, outcome)
            del batch, outcome  # not until the next batch comes

    def _is_quick(self, entry: _Entry, requests: int, rows: int) -> bool:
        """Of a batch of so many requests, of which `entry` is one."""
        limit = _INLINE_SECONDS
        if not entry.accepted_slowly:
            limit = max(limit, min(requests * _EACH_SECONDS, _LONGEST_INLINE))
        return self._seconds.get(rows.bit_length(), 1.0) < limit

    def _runs_inline(self, batch: list[_Entry]) -> bool:
        if not batch[0].accepted_slowly:
            return True
        # While the event loop runs a batch none of these get here, so that each would run alone.
        self._inline += 1
        return self._company < _ALONE and self._inline % _LOOKS != 0

    def _next_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        rows, now = 0, monotonic()
        share = -(-self._waiting_rows // max(self.at_once - self._under_way, 1))
        if self._queue and self._is_quick(self._first, len(self._queue), self._waiting_rows):
            share = self._waiting_rows
        while self._queue:
            entry = self._first
            if entry.result.done() or entry.deadline <= now:
                if not entry.result.done():
                    entry.result.set_exception(expired(begun=False))
                self._drop(entry)
                continue
            if batch and (
                entry.model is not batch[0].model
                or rows + len(entry.rows) > self._max_rows
                or 2 * max(len(entry.rows), len(batch[0].rows)) >= self._max_rows
                or (rows >= share and not self._is_quick(batch[0], len(batch), rows))
            ):
                break
            del self._queue[entry]
            batch.append(entry)
            rows += len(entry.rows)
            self._waiting_rows -= len(entry.rows)
        return batch

    def _run(self, batch: Sequence[_Entry]) -> _Outcome:
        begin, now = perf_counter(), monotonic()
        entries = [entry for entry in batch if entry.deadline > now and not entry.result.done()]
        for entry in entries:
            entry.begun = True
        try:
            outputs, computed = entries[0].model.run([entry.rows for entry in entries]) if entries else ([], 0)
        except BaseException as e:
            return _Outcome(entries, [], 0, begin, 0.0, e)
        return _Outcome(entries, outputs, computed, begin, perf_counter() - begin)

    def _ran(self, batch: list[_Entry], outcome: _Outcome) -> None:
        self._under_way -= 1
        if self._gathering is batch:
            self._gathering = None
        self._company += 0.1 * (self._beside - self._company)
        self._beside = 0
        self._finish(batch, outcome)
        if self._stopped is not None and not self._under_way:
            self._stopped.set_result(None)

    def _finish(self, batch: Sequence[_Entry], outcome: _Outcome) -> None:
        entries = outcome.entries
        self._queued_rows -= sum(len(entry.rows) for entry in batch)
        if len(entries) < len(batch):
            self._fail([entry for entry in batch if not entry.begun], expired(begun=False))
        for entry in entries:
            self._metrics.stage("queue", outcome.begin - entry.timed)
        if outcome.error is not None:
            # Requests were checked before, so this is the model's or the machine's fault, and not theirs.
            self._metrics.log.error("a batch failed", exc_info=outcome.error)
            message = f"the model failed: {type(outcome.error).__name__}; see the log of the server."
            self._fail(entries, RequestError(503, message, retry_after=1))
        elif entries:
            rows, seconds = sum(len(entry.rows) for entry in entries), outcome.seconds
            if entries[0].model is not self._model():
                self._model = weakref.ref(entries[0].model)
                self._seconds.clear()
            self._rows_each += _RECENT * (rows / len(entries) - self._rows_each)
            known = self._seconds.get(rows.bit_length(), seconds)
            # What it takes, and not what it takes when the machine is busy with something else.
            self._seconds[rows.bit_length()] = min(seconds, known + _FORGET * (seconds - known))
            self._metrics.batch(seconds, len(entries), rows, outcome.computed, self._max_rows)
            first = 0
            for entry in entries:
                last = first + len(entry.rows)
                if not entry.result.done():
                    entry.done = True
                    self.done += 1
                    entry.result.set_result([output[first:last] for output in outcome.outputs])
                self._disarm(entry)
                first = last
        if self._queue and self._loop is not None and self._has_room:
            self._schedule()

    def _fail(self, batch: Sequence[_Entry], error: RequestError) -> None:
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


def _no_model() -> None:
    """There was none."""


def _expire(entry: _Entry) -> None:
    if not entry.result.done():
        entry.result.set_exception(expired(entry.begun))
