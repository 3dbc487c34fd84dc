"""Service: what all protocols share between reading a request and writing its answer."""

import asyncio
import contextlib
from collections.abc import Iterator
from time import monotonic

import numpy as np

from jaxembed.serve.rows import Rows

from .batcher import Batcher
from .config import ServerConfig
from .cores import cores_of_worker
from .errors import RequestError, overloaded, unavailable
from .large import Large
from .metrics import Metrics
from .request import InferenceRequest
from .served import ServedModel
from .shedding import LEAST, Shedding
from .versions import Versions

_FLUSH_SECONDS = 0.2
_BATCHES = 3  # that a request may see: the one that runs, its own, and another's beside it
_ARRIVING_SECONDS = 0.25  # in which the body of a request is not ended for that of another


class Room:
    """Room for a request whose headers are there, until it is admitted.

    Args:
      held: one item for each that is held.
      shedding: to which its request is under way.
    """

    def __init__(self, held: list[None], shedding: Shedding):
        self._held: list[None] | None = held
        self._shedding = shedding
        held.append(None)
        shedding.begin()

    def take(self) -> bool:
        """Whether it was held until now: the request, which is still under way, is admitted to it."""
        held, self._held = self._held, None
        if held is None:
            return False
        held.pop()
        return True

    def release(self) -> None:
        """The request, if it was not admitted, is no longer under way."""
        if self.take():
            self._shedding.end(answered=False)


class Admission:
    """A request is admitted while this is entered; as `Service.admission`."""

    __slots__ = ("_room", "_service")

    def __init__(self, service: "Service", room: Room | None):
        self._service, self._room = service, room

    def __enter__(self) -> None:
        """Takes room."""
        service, room = self._service, self._room
        if service.draining:
            raise unavailable("it is stopping")
        if room is None or not room.take():
            if service.full:
                raise overloaded(f"{service.admitted} requests are served or wait already")
            service.shedding.begin()
        service.admitted += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives it back; what raised nothing was answered."""
        self._service.admitted -= 1
        self._service.shedding.end(kind is None)


class Service:
    """A server without its protocols.

    Args:
      config: of the server.
      versions: what it serves; by default those of `config.bundles`.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics | None = None, versions: Versions | None = None):
        self.config = config
        self.metrics: Metrics = metrics or Metrics()
        self.versions: Versions = versions or Versions(config, self.metrics)
        self.batcher: Batcher = Batcher(
            config.max_batch_rows,
            config.batch_wait_ms / 1e3,
            config.max_queue_rows,
            self.metrics,
            config.batches_at_once or cores_of_worker(config.workers),
        )
        self.shedding: Shedding = Shedding(
            self._may_take, config.max_queue_requests, max(LEAST, 2 * self.batcher.at_once)
        )
        self.large: Large = Large(config.max_body_bytes, self.metrics, self.shedding.aside)
        #: Readiness says no, and requests are served all the same.
        self.leaving: bool = False
        self.draining: bool = False
        #: Requests that are read, wait or run.
        self.admitted: int = 0
        self._max_requests = config.max_queue_requests
        self._rooms: list[None] = []
        self._arriving: dict[asyncio.Timeout, float] = {}  # since when, the first one first
        self._flushing: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return not self.leaving and not self.draining and self.versions.current is not None

    @property
    def full(self) -> bool:
        """Whether there is no room for another request; those that only need to be answered take none."""
        ready = self.batcher.done
        taken = self.admitted - len(self._arriving) + len(self._rooms) - ready
        return self.shedding.full(ready) or taken >= self._max_requests

    def _may_take(self) -> float:
        """Seconds that a request may take. Those of a model that is slow need a queue as long."""
        config = self.config
        queue = max(config.max_queue_ms / 1e3, _BATCHES * self.batcher.seconds_alone)
        return queue + config.batch_wait_ms / 1e3

    def refuses(self) -> bool:
        """Whether requests are refused at their headers; asked for each that comes."""
        return self.full and not self.leaving

    async def start(self) -> None:
        """Loads a version and starts to run batches."""
        self.batcher.start()
        await self.versions.start()
        self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def stop(self, until: float | None = None) -> None:
        """Lets the requests that were admitted end, and stops.

        Args:
          until: in the time of `time.monotonic`, when it no longer waits for them; None waits for `drain_timeout`.
        """
        self.draining = True
        if until is None:
            until = monotonic() + self.config.drain_timeout
        while self.admitted and monotonic() < until:
            await asyncio.sleep(0.01)
        await self.versions.stop()
        await self.batcher.stop()
        self.large.stop()
        if self._flushing is not None:
            self._flushing.cancel()
        self.metrics.flush()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            self.flush()  # of each worker, whichever is asked

    def flush(self) -> None:
        """Hands on to the metrics what was counted."""
        self.metrics.queued(self.batcher.queued_rows, self.shedding.limit)
        self.metrics.flush()

    def room(self) -> Room:
        """Room for one request, to be released unless it is admitted to it."""
        return Room(self._rooms, self.shedding)

    def admission(self, room: Room | None = None) -> "Admission":
        """Room for one request, held until it is answered.

        Args:
          room: that was kept for it.

        Raises:
          RequestError: as it is entered, if there is none, or the server stops; before anything of the request is read.
        """
        return Admission(self, room)

    @contextlib.contextmanager
    def arriving(self, until: asyncio.Timeout) -> Iterator[None]:
        """Around the wait for the body of a request that was admitted: it takes no room until its body is there.

        As many bodies may be under way as requests be admitted. If there are more, the one that has been for longest is
        ended, unless that is not long: who announces bodies, and sends them slowly or never, keeps nobody else out.

        Args:
          until: ends the wait.

        Raises:
          RequestError: if there is no place for another body, or no room for the request once its own is there.
        """
        now = monotonic()
        if len(self._arriving) >= self._max_requests:
            first, begin = next(iter(self._arriving.items()))
            if now - begin < _ARRIVING_SECONDS:
                raise overloaded(f"the bodies of {len(self._arriving)} requests are under way already")
            del self._arriving[first]
            if not first.expired():
                first.reschedule(0)
        self._arriving[until] = now
        try:
            with self.shedding.aside():
                yield
                if self.full:
                    raise overloaded(f"{self.admitted} requests are served or wait already")
        finally:
            self._arriving.pop(until, None)

    async def infer(
        self, model: ServedModel, request: InferenceRequest, begin: float, accepted_slowly: bool = False
    ) -> list[tuple[str, np.ndarray]]:
        """Runs a request.

        Args:
          model: the version that serves it.
          request: as a protocol read it.
          begin: when it arrived, in the time of `time.monotonic`; its timeout counts from there.
          accepted_slowly: as of `Batcher.submit`.

        Returns:
          The outputs that it asked for, by name.

        Raises:
          RequestError: if it is not served.
        """
        names = model.signature.output_names
        wanted = names if request.outputs is None else list(request.outputs)
        unknown = None if wanted is names else next((name for name in wanted if name not in names), None)
        if unknown is not None:
            raise RequestError(400, f"output {unknown[:100]!r} is unknown; outputs are {names}.")
        rows = request.inputs if isinstance(request.inputs, Rows) else self._pack(model, request)
        timeout = self.config.default_timeout
        if request.timeout is not None:
            timeout = min(timeout, request.timeout)
        arrays = await self.batcher.submit(model, rows, begin + timeout, accepted_slowly)
        if wanted is names:
            return list(zip(names, arrays, strict=True))
        outputs = dict(zip(names, arrays, strict=True))
        return [(name, outputs[name]) for name in wanted]

    def _pack(self, model: ServedModel, request: InferenceRequest) -> Rows:
        assert not isinstance(request.inputs, Rows)
        try:
            return model.pack(request.inputs, request.weights, request.dense)
        except RequestError as e:
            if e.feature is not None:
                self.metrics.bad_id(e.feature)
            raise
