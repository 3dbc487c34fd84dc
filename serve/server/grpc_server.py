"""The gRPC server of a worker; its port may be shared with those of other workers."""

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable
from time import monotonic, perf_counter
from typing import Any

import grpc

from . import v2_grpc, v2_json
from .errors import RequestError, out_of_memory
from .messages import METHODS, SERVICE
from .request import LARGE, InferenceRequest
from .served import ServedModel
from .service import Service

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Of the text of an error: clients take 8 KiB of metadata, and each byte that is not ASCII is sent as three.
_TEXT_BYTES = 2400
_MOST_BYTES = (1 << 31) - 1  # of a message, as gRPC counts them
_LONGEST = 1e6  # seconds, of those that it is told


async def start_grpc(service: Service, host: str, port: int) -> grpc.aio.Server:
    """Starts to serve gRPC.

    Raises:
      RuntimeError: if the port cannot be bound.
    """
    limit, timeout = min(service.config.max_body_bytes, _MOST_BYTES), service.config.default_timeout
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
            # gRPC itself would cancel calls that the event loop did not accept in 30 s, as if the client had.
            ("grpc.server_max_unrequested_time_in_server", math.ceil(min(timeout, _LONGEST)) + 60),
        ]
    )
    methods = Methods(service)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(methods, name),
            request_deserializer=None if name == "ModelInfer" else _tolerant(request),
            response_serializer=_serialize,
        )
        for name, (request, _) in METHODS.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    return server


def _tolerant(message: Any) -> Callable[[bytes], Any]:
    """Messages that cannot be read are refused by the method, which can say so; gRPC would call them internal."""

    def deserialize(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except Exception as e:
            return e

    return deserialize


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()


def _cut(message: str) -> str:
    text = message.encode()
    return message if len(text) <= _TEXT_BYTES else text[:_TEXT_BYTES].decode(errors="ignore") + "..."


class Methods:
    """A method for each of the protocol's."""

    def __init__(self, service: Service):
        self._service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """The process answers."""
        return METHODS["ServerLive"][1](live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Requests are served."""
        return METHODS["ServerReady"][1](ready=self._service.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Requests are served by this model."""

        async def answer() -> Any:
            try:
                self._model(request.name, request.version)
            except RequestError:
                return METHODS["ModelReady"][1](ready=False)
            return METHODS["ModelReady"][1](ready=self._service.ready)

        return await self._answer(request, context, answer)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Name, version and extensions."""
        return METHODS["ServerMetadata"][1](name="jaxembed", version="0.1.0")

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Inputs and outputs."""

        async def answer() -> Any:
            model = self._model(request.name, request.version)
            return METHODS["ModelMetadata"][1](**v2_json.metadata(model, request.name, [model.version]))

        return await self._answer(request, context, answer)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Runs a request."""
        service, begin = self._service, perf_counter()
        arrived = monotonic()

        async def answer() -> Any:
            with service.admission(), service.large.hold() as hold:
                remaining = context.time_remaining()
                if len(request) < LARGE:
                    model, name, read = self._read(request)
                else:
                    hold.grow(len(request))
                    default = service.config.default_timeout
                    until = arrived + (default if remaining is None else min(remaining, default))
                    model, name, read = await self._read_large(request, until)
                service.metrics.stage("parse", perf_counter() - begin)
                if remaining is not None:
                    timeout = remaining if read.timeout is None else min(remaining, read.timeout)
                    read = dataclasses.replace(read, timeout=timeout)
                outputs = await service.infer(model, read, arrived, accepted_slowly=True)
                written = perf_counter()
                response = v2_grpc.write(model, name, read, outputs)
                service.metrics.stage("write", perf_counter() - written)
                return response

        return await self._answer(request, context, answer, begin)

    def _read(self, body: bytes) -> tuple[ServedModel, str, InferenceRequest]:
        """The model that a ModelInferRequest is for, its name, and the request."""
        current = self._service.versions.current
        found = (
            None if current is None or current.reader is None else v2_grpc.read_natively(current.reader, body)
        )
        message = v2_grpc.message_of(body) if found is None else found[0]
        model = self._model(message.model_name, message.model_version)
        read = (
            v2_grpc.read(model.signature, message)
            if found is None
            else v2_grpc.request(message, found[1], {}, {})
        )
        return model, message.model_name, read

    async def _read_large(self, body: bytes, until: float) -> tuple[ServedModel, str, InferenceRequest]:
        """`_read` elsewhere than in the event loop, for the version that serves then."""
        large = self._service.large
        while True:
            current, found = self._service.versions.model(), None
            if current.reader is not None:
                found = await large.run(until, v2_grpc.read_natively, current.reader, body)
            if found is not None:
                message, rows = found
                name, version = message.model_name, message.model_version
                read: Any = v2_grpc.request(message, rows, {}, {})
            else:
                name, version, read = await large.apart(until, "message", current.signature, body)
            if self._model(name, version) is current:
                break
        if not isinstance(read, InferenceRequest):
            error = RequestError(**read)
            if error.feature is not None:
                self._service.metrics.bad_id(error.feature)
            raise error
        return current, name, read

    def _model(self, name: str, version: str) -> Any:
        if name != self._service.config.name:
            raise RequestError(404, f"model {name[:100]!r} is not served; {self._service.config.name!r} is.")
        return self._service.versions.model(version)

    async def _answer(
        self, request: Any, context: Any, answer: Callable[[], Awaitable[Any]], begin: float | None = None
    ) -> Any:
        status = 500
        try:
            if isinstance(request, Exception):
                raise RequestError(400, "the message cannot be read.")
            try:
                response = await answer()
            except MemoryError as e:
                e.__traceback__ = None
                raise out_of_memory() from None
            status = 200
            return response
        except asyncio.CancelledError:
            status = 499
            raise
        except RequestError as e:
            status = e.status
            if e.retry_after is not None:
                context.set_trailing_metadata((("retry-after", str(e.retry_after)),))
            # A status that comes alone, and not after an empty message: of others, clients send no call again.
            try:
                await context.abort(_CODES.get(e.status, grpc.StatusCode.UNKNOWN), _cut(e.message))
            except grpc.aio.AbortError as aborted:  # gRPC keeps it with the call, and raises it once more
                aborted.__traceback__ = aborted.__context__ = None
            # It holds the request, and what waited for it may hold this: only looking for cycles would let go of them.
            e.__traceback__ = None
            return None
        finally:
            if begin is not None:
                self._service.metrics.request("v2_grpc", status, perf_counter() - begin)
