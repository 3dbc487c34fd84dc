"""Large: requests that take long to read, read elsewhere than in the event loop, a few at a time."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from time import monotonic
from typing import Any

from . import v2_binary
from .apart import Apart
from .errors import RequestError, expired, overloaded, unavailable
from .metrics import Metrics
from .request import LARGE, InferenceRequest
from .served import ServedModel

_HELD_BODIES = 4  # of the largest size that there may be
_IDLE_SECONDS = 60.0
_GRACE_SECONDS = 2.0  # about what it takes to start another process


class Hold:
    """What one request holds of the bytes that bodies may take together; those of small ones are not counted."""

    __slots__ = ("_bytes", "_large")

    def __init__(self, large: "Large"):
        self._large, self._bytes = large, 0

    def expect(self, size: int) -> None:
        """The request will take so many bytes, if they come: what is only announced takes none.

        Raises:
          RequestError: if there is no room for them now.
        """
        self._check(size, size)

    def grow(self, size: int) -> None:
        """The request takes so many bytes altogether.

        Raises:
          RequestError: if there is no room for them.
        """
        more = size - self._bytes
        if size < LARGE or more <= 0:
            return
        self._check(size, more)
        self._large.held += more
        self._bytes = size

    def _check(self, size: int, more: int) -> None:
        if size >= LARGE and self._large.held + more > self._large.most:
            raise overloaded(f"the bodies of large requests take {self._large.held} bytes already")

    def __enter__(self) -> "Hold":
        """It takes nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """It takes nothing any more."""
        self._large.held -= self._bytes


class Large:
    """Reads large requests: on a thread what native code reads, all else in a process of its own, one at a time each.

    Args:
      max_body_bytes: of one request.
      metrics: told of bad ids.
      aside: around the wait of a request that is read elsewhere.
    """

    def __init__(
        self,
        max_body_bytes: int,
        metrics: Metrics,
        aside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.most: int = _HELD_BODIES * max_body_bytes
        #: Bytes of the bodies that are held.
        self.held: int = 0
        self._metrics, self._aside, self._apart = metrics, aside, Apart()
        self._thread, self._asking = _Lane("jaxembed-read"), _Lane("jaxembed-apart", self._apart.abandon)
        self._asked, self._idle = 0, None

    def hold(self) -> Hold:
        """For the bytes of one request, while it is entered."""
        return Hold(self)

    async def v2(
        self, model: ServedModel, body: bytes, header: str | None, until: float
    ) -> tuple[InferenceRequest, set[str] | bool]:
        """What `v2_binary.read` gives.

        Args:
          model: that it is for.
          body: of the request.
          header: as of `v2_binary.read`.
          until: its deadline, in the time of `time.monotonic`.

        Raises:
          RequestError: if it is none, or the deadline passed first.
        """
        if model.reader is not None:
            found = await self.run(until, v2_binary.read_natively, model.reader, body, header)
            if found is not None:
                return found
        return await self.apart(until, "v2", model.signature, body, header)

    async def run(
        self, until: float, function: Callable[..., Any], *arguments: Any, begun: bool = False
    ) -> Any:
        """The value of a function that lets go of the interpreter, from the thread.

        Args:
          until: the deadline, in the time of `time.monotonic`.
          function: to be called.
          arguments: of it.
          begun: whether the request that it is for ran already.

        Raises:
          RequestError: if the deadline passed first.
        """
        with self._aside():
            return await self._thread.call(until, function, *arguments, begun=begun)

    async def apart(self, until: float, reader: str, *arguments: Any) -> Any:
        """What a reader of READERS makes of a signature and a request, in a process of its own.

        Raises:
          RequestError: if it refuses the request, or the deadline passed first.
        """
        self._asked += 1
        if self._idle is not None:
            self._idle.cancel()
        try:
            with self._aside():
                return await self._asking.call(until, self._apart.read, reader, *arguments)
        except RequestError as e:
            if e.feature is not None:
                self._metrics.bad_id(e.feature)
            raise
        finally:
            self._asked -= 1
            if not self._asked:
                self._idle = asyncio.get_running_loop().call_later(
                    _IDLE_SECONDS, self._asking.call_soon, self._apart.stop
                )

    def stop(self) -> None:
        """Ends threads and process; nothing is to be read any more."""
        if self._idle is not None:
            self._idle.cancel()
        self._thread.end(wait=False)
        self._apart.end()
        self._asking.end(wait=True)
        self._apart.stop()


class _Lane:
    """A thread that calls one function at a time. Who gives up waiting leaves nothing behind, such as a body.

    Args:
      name: of the thread.
      abandon: ends the call that runs; used if nobody waits for it any more, and it does not end soon. None lets it run.
    """

    def __init__(self, name: str, abandon: Callable[[], None] | None = None):
        self._name, self._abandon = name, abandon
        self._pool, self._free = concurrent.futures.ThreadPoolExecutor(1, name), asyncio.Lock()
        self._ended = False

    async def call(
        self, until: float, function: Callable[..., Any], *arguments: Any, begun: bool = False
    ) -> Any:
        called = None
        try:
            async with asyncio.timeout(until - monotonic()):
                await self._free.acquire()
                loop = asyncio.get_running_loop()
                called = self._submit(function, *arguments)
                called.add_done_callback(lambda _: self._release(loop))  # also if nobody waits any more
                return await asyncio.wrap_future(called)
        except TimeoutError:
            raise expired(begun) from None
        finally:
            if called is not None:
                self._end_soon(called)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
        try:
            return self._pool.submit(function, *arguments)
        except BaseException as e:
            self._free.release()
            if self._ended:
                raise unavailable("it is stopping") from None
            # The pool keeps the call that it has no thread for, and its body: before the next one it would run.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = concurrent.futures.ThreadPoolExecutor(1, self._name)
            if not isinstance(e, RuntimeError):  # there is no memory, say
                raise
            raise unavailable("it has no thread for large ones, and can start none") from None

    def call_soon(self, function: Callable[[], None]) -> None:
        self._pool.submit(function)

    def end(self, wait: bool) -> None:
        self._ended = True
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _end_soon(self, called: concurrent.futures.Future[Any]) -> None:
        if self._abandon is not None and not called.done():
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._end, called, self._abandon)

    def _end(self, called: concurrent.futures.Future[Any], abandon: Callable[[], None]) -> None:
        if not called.done():
            abandon()
            self._end_soon(called)  # what it waits for may only start now

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._free.release)
