"""Inference: answers requests for predictions over HTTP, of v2 and of TensorFlow Serving."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from . import tf_predict, v2_binary, v2_json
from .answer import Answer, error_answer
from .body import read_body
from .errors import RequestError, out_of_memory
from .request import LARGE, InferenceRequest, timeout_from
from .scope import ROOM, TASK
from .service import Room, Service
from .whole import Whole

TIMEOUT_HEADER = "x-request-timeout-ms"
LARGE_ANSWER = 1 << 18  # bytes of outputs from which on writing them would keep the event loop for long
_SIZE_HEADER = "Inference-Header-Content-Length"
#: Header fields that are read of a whole request.
FIELDS = (TIMEOUT_HEADER, v2_binary.HEADER)


class Inference:
    """What answers requests for predictions, however HTTP brings them.

    Args:
      service: behind it.
    """

    def __init__(self, service: Service):
        self._service, self._config = service, service.config

    def whole(self, protocol: str) -> Whole:
        """What answers whole requests of a protocol, as of `respond`."""

        def answers(
            fields: Mapping[str, str], body: bytes | None, scope: dict[str, Any], room: Room | None
        ) -> Awaitable[Answer]:
            return self._answer(protocol, fields, None, scope, room, body)

        return answers

    async def respond(self, request: Request, protocol: str) -> Response:
        """Answers a request of ASGI.

        Args:
          request: of it.
          protocol: "v2_rest" or "tf_rest".
        """
        scope, version = request.scope, request.path_params.get("version")
        room = scope.pop(ROOM, None)
        answer = await self._answer(protocol, request.headers, version, scope, room, request)
        return answer.response()

    async def _answer(
        self,
        protocol: str,
        fields: Mapping[str, str],
        version: str | None,
        scope: MutableMapping[str, Any],
        room: Room | None,
        body: bytes | Request | None,
    ) -> Answer:
        service, begin = self._service, perf_counter()
        arrived, status = monotonic(), 500
        task = scope[TASK] = asyncio.current_task()
        try:
            with service.admission(room), service.large.hold() as hold:
                if isinstance(body, Request):
                    body = await read_body(body, service, hold)
                elif body is None:
                    raise ClientDisconnect
                service.metrics.stage("read", perf_counter() - begin)
                handle = self._infer if protocol == "v2_rest" else self._predict
                answer = await handle(body, fields, version, arrived)
            status = answer.status
            return answer
        except RequestError as e:
            status = e.status
            # It holds the body, and what waited for it may hold this: only looking for cycles would let go of them.
            e.__traceback__ = None
            return error_answer(e)
        except MemoryError as e:
            status = 503
            e.__traceback__ = None
            return error_answer(out_of_memory())
        except (ClientDisconnect, asyncio.CancelledError) as e:
            status = 499
            if isinstance(e, asyncio.CancelledError):
                if TASK in scope:  # cancelled by another server than ours, or as the server ends
                    raise
                assert task is not None
                task.uncancel()
            return Answer(status, b"")
        finally:
            scope.pop(TASK, None)
            service.metrics.request(protocol, status, perf_counter() - begin)

    async def _infer(self, body: bytes, fields: Mapping[str, str], version: str | None, begin: float) -> Answer:
        service, started = self._service, perf_counter()
        model = service.versions.model(version)
        header, timeout = fields.get(v2_binary.HEADER), _timeout(fields)
        if len(body) < LARGE:
            read, wanted = v2_binary.read(model, body, header)
        else:
            read, wanted = await service.large.v2(model, body, header, self._until(begin, timeout))
        service.metrics.stage("parse", perf_counter() - started)
        read = _with_timeout(read, timeout)
        outputs = await service.infer(model, read, begin)
        written = perf_counter()
        head, parts = await self._write(outputs, v2_json.write, model, self._config.name, read, outputs, wanted)
        service.metrics.stage("write", perf_counter() - written)
        if not parts:
            return Answer(200, head)
        sizes = ((_SIZE_HEADER, str(len(head))),)
        return Answer(200, b"".join([head, *parts]), "application/octet-stream", sizes)

    async def _predict(
        self, body: bytes, fields: Mapping[str, str], version: str | None, begin: float
    ) -> Answer:
        service, started = self._service, perf_counter()
        model = service.versions.model(version)
        timeout = _timeout(fields)
        if len(body) < LARGE:
            read, by_row = tf_predict.read(model.signature, body)
        else:
            until = self._until(begin, timeout)
            read, by_row = await service.large.apart(until, "predict", model.signature, body)
        service.metrics.stage("parse", perf_counter() - started)
        outputs = await service.infer(model, _with_timeout(read, timeout), begin)
        written = perf_counter()
        content = await self._write(outputs, tf_predict.write, by_row, outputs)
        service.metrics.stage("write", perf_counter() - written)
        return Answer(200, content)

    async def _write(
        self, outputs: Sequence[tuple[str, np.ndarray]], write: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What `write` gives, on a thread if it is of large outputs."""
        if sum(array.nbytes for _, array in outputs) < LARGE_ANSWER:
            return write(*arguments)
        until = monotonic() + self._config.default_timeout
        return await self._service.large.run(until, write, *arguments, begun=True)

    def _until(self, begin: float, timeout: float | None) -> float:
        """The deadline of a request of which only a header was read."""
        default = self._config.default_timeout
        return begin + (default if timeout is None else min(timeout, default))


def _timeout(fields: Mapping[str, str]) -> float | None:
    """Seconds, as the header says."""
    header = fields.get(TIMEOUT_HEADER)
    if header is None:
        return None
    try:
        milliseconds: Any = float(header)
    except ValueError:
        milliseconds = header
    return timeout_from(milliseconds, 1e3)


def _with_timeout(read: InferenceRequest, timeout: float | None) -> InferenceRequest:
    if timeout is None:
        return read
    return dataclasses.replace(read, timeout=timeout if read.timeout is None else min(read.timeout, timeout))
