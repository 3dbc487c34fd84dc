"""The routes over HTTP: v2, TensorFlow Serving's predict, health, metrics and switching of versions."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import tf_predict, v2_json
from .answer import error_answer
from .authorization import authorize
from .errors import RequestError
from .inference import Inference
from .openapi import openapi
from .service import Service
from .status import page, status
from .whole import Whole

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'none'"
}
_EXTENSIONS = ["binary_tensor_data"]
_VERSION = "0.1.0"


def make_app(
    service: Service,
    *,
    predict_route: str | None = None,
    health_route: str | None = None,
    lifespan: bool = False,
) -> "App":
    """The application.

    Args:
      service: started, or to be by the lifespan.
      predict_route: another path for TensorFlow Serving's predict, as Vertex AI names it.
      health_route: another path for readiness.
      lifespan: whether the application starts and stops the service, for servers that are not ours; it has started
        once a version serves.
    """
    routes = Routes(service)
    name = service.config.name
    v1, v2 = f"/v1/models/{name}", f"/v2/models/{name}"
    table = [
        Route("/", routes.page),
        Route("/status", routes.status),
        Route("/metrics", routes.metrics),
        Route("/openapi.json", routes.openapi),
        Route("/v2", routes.server_metadata),
        Route("/v2/health/live", routes.live),
        Route("/v2/health/ready", routes.ready),
        Route("/admin/versions/{version}:activate", routes.activate, methods=["POST"]),
        Route("/admin/versions:latest", routes.follow, methods=["POST"]),
    ]
    for prefix in (v2, v2 + "/versions/{version}"):
        table += [
            Route(prefix, routes.metadata),
            Route(prefix + "/ready", routes.model_ready),
            Route(prefix + "/infer", routes.infer, methods=["POST"]),
        ]
    for prefix in (v1 + "/versions/{version}", v1):
        table += [
            Route(prefix + "/metadata", routes.tf_metadata),
            Route(prefix + ":predict", routes.predict, methods=["POST"]),
            Route(prefix, routes.tf_status),
        ]
    if predict_route:
        table.insert(0, Route(predict_route, routes.predict, methods=["POST"]))
        routes.further[predict_route] = f"{v1}:predict"
    if health_route:
        table.insert(0, Route(health_route, routes.ready))
        routes.further[health_route] = "/v2/health/ready"
    app = App(
        routes=table,
        exception_handlers={404: _not_found, 405: _not_found},
        lifespan=(lambda _: _running(service)) if lifespan else None,
    )
    served = {f"{v2}/infer": "v2_rest", f"{v1}:predict": "tf_rest"}
    if predict_route:
        served[predict_route] = "tf_rest"
    handlers = {"v2_rest": routes.infer, "tf_rest": routes.predict}
    app.direct = {path: handlers[protocol] for path, protocol in served.items()}
    app.served = {path.encode(): protocol for path, protocol in served.items()}
    app.whole = {path: routes.inference.whole(protocol) for path, protocol in app.served.items()}
    return app


class App(Starlette):
    """Takes the paths that most requests are for past Starlette's routing.

    Attributes:
      direct: handlers, by path.
      served: their protocols, by path.
      whole: what answers whole requests past ASGI, by path.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.direct: dict[str, Callable[[Request], Awaitable[Response]]] = {}
        self.served: dict[bytes, str] = {}
        self.whole: dict[bytes, Whole] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.direct.get(scope["path"]) if scope["type"] == "http" else None
        if handler is None or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


@contextlib.asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    await service.start()
    try:
        await service.versions.loaded()
        yield
    finally:
        await service.stop()


class Routes:
    """A handler for every route."""

    def __init__(self, service: Service):
        self._service, self._config = service, service.config
        self.inference: Inference = Inference(service)
        self.further: dict[str, str] = {}  # paths, and those that they are others of

    async def infer(self, request: Request) -> Response:
        """v2, in JSON or with binary tensors."""
        return await self.inference.respond(request, "v2_rest")

    async def predict(self, request: Request) -> Response:
        """TensorFlow Serving's predict."""
        return await self.inference.respond(request, "tf_rest")

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Requests are served."""
        return self._ready({})

    async def model_ready(self, request: Request) -> Response:
        """Requests are served, by this version if it names one."""
        try:
            self._service.versions.model(request.path_params.get("version"))
        except RequestError as e:
            return error_answer(e).response()
        return self._ready({"name": self._config.name})

    def _ready(self, named: dict[str, str]) -> Response:
        ready = self._service.ready
        headers = None if ready else {"Retry-After": "1"}
        return JSONResponse({**named, "ready": ready}, 200 if ready else 503, headers)

    async def server_metadata(self, request: Request) -> Response:
        """Name, version and extensions."""
        return JSONResponse({"name": "jaxembed", "version": _VERSION, "extensions": _EXTENSIONS})

    async def metadata(self, request: Request) -> Response:
        """Inputs and outputs, as v2 says them."""
        try:
            model = self._service.versions.model(request.path_params.get("version"))
        except RequestError as e:
            return error_answer(e).response()
        return JSONResponse(v2_json.metadata(model, self._config.name, [model.version]))

    async def tf_metadata(self, request: Request) -> Response:
        """Inputs and outputs, as TensorFlow Serving says them."""
        try:
            model = self._service.versions.model(request.path_params.get("version"))
        except RequestError as e:
            return error_answer(e).response()
        return JSONResponse(tf_predict.metadata(model, self._config.name))

    async def tf_status(self, request: Request) -> Response:
        """The versions' states, as TensorFlow Serving says them."""
        try:
            model = self._service.versions.model(request.path_params.get("version"))
        except RequestError as e:
            return error_answer(e).response()
        state = {"version": str(model.version), "state": "AVAILABLE"}
        state["status"] = {"error_code": "OK", "error_message": ""}  # type: ignore[assignment]
        return JSONResponse({"model_version_status": [state]})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self._service.flush()
        text = await asyncio.to_thread(self._service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """What is here, for programs."""
        return JSONResponse(openapi(self._config.name, self._service.versions.current, self.further))

    async def page(self, request: Request) -> Response:
        """What is here, for people."""
        return Response(page(), headers=_PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def status(self, request: Request) -> Response:
        """What the page shows."""
        return JSONResponse(status(self._service))

    async def activate(self, request: Request) -> Response:
        """Pins a version."""
        version = request.path_params["version"]
        if not (version.isascii() and version.isdecimal() and len(version) < 19):
            return error_answer(
                RequestError(400, f"version must be a number, got {version[:40]!r}.")
            ).response()
        return await self._pin(request, int(version))

    async def follow(self, request: Request) -> Response:
        """Follows the newest version again."""
        return await self._pin(request, None)

    async def _pin(self, request: Request, version: int | None) -> Response:
        try:
            authorize(request, self._config.admin_token)
            await self._service.versions.pin(version)
        except RequestError as e:
            return error_answer(e).response()
        current = self._service.versions.current
        return JSONResponse({"version": None if current is None else current.version, "pinned": version})


async def _not_found(request: Request, error: Exception) -> Response:
    code = getattr(error, "status_code", 404)
    headers = getattr(error, "headers", None) or {}
    message = f"{request.method} {request.url.path[:200]} is not served here; see /openapi.json."
    return JSONResponse({"error": message}, code, headers)
