"""Doors: where a worker accepts connections, and when: never where others would serve what it cannot."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from time import monotonic
from typing import Any

import uvicorn

from .app import make_app
from .config import ENDING_SECONDS
from .http_protocol import DeadlineProtocol, make_protocol
from .peers import Peers
from .service import Service

_LOOK_SECONDS = 0.02
# For what is accepted already, and not read yet.
_LAST_SECONDS = 0.1
_BACKLOG = 1024


class Doors:
    """HTTP and gRPC of one worker.

    The workers accept from one socket. One without a version accepts only while no other serves: what it took, it
    would refuse.

    Args:
      service: what answers.
      peers: the other workers.
      listener: of HTTP; bound, and listening.
      grpc_port: may be shared with other processes; None serves no gRPC.
      routes: further ones, of `make_app`.
    """

    def __init__(
        self,
        service: Service,
        peers: Peers,
        listener: socket.socket,
        grpc_port: int | None,
        **routes: str | None,
    ):
        self._service, self._peers = service, peers
        self._listener, self._grpc_port = listener, grpc_port
        app = make_app(service, **routes)  # type: ignore[arg-type]
        self._protocol = make_protocol(service, app)
        self._config = uvicorn.Config(
            app,
            http=self._protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=service.config.idle_timeout,  # type: ignore[arg-type]
            timeout_graceful_shutdown=ENDING_SECONDS - 2,  # the rest is for what is left after that
        )
        self._http = _HttpServer(self._config)
        self._grpc: Any = None
        self._open = False

    async def run(self) -> None:
        """Serves what is accepted, until `stop`."""
        await self._http.serve(sockets=[])

    async def mind(self, loading: asyncio.Task[None]) -> None:
        """Opens and closes, until a version serves.

        Args:
          loading: the start of the service. What it raises is raised.
        """
        while not self._http.started:
            await asyncio.sleep(0)
        said = False
        while True:
            if loading.done():
                loading.result()
            serves = self._service.versions.current is not None
            if serves or not self._peers.others():
                await self._accept()
            else:
                await self._refuse()
            if self._open and loading.done() and not said:
                said = True
                extra = {"ready": self._service.ready, "port": self._listener.getsockname()[1]}
                self._service.metrics.log.info("serving", extra=extra)
            if said and serves:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def leave(self) -> None:
        """Answers that are due say that they are the last of their connections; those to come do by themselves."""
        for connection in self._connections:
            connection.leave()

    async def stop(self) -> None:
        """Accepts nothing more, answers what was sent in the time to drain, of gRPC and HTTP together, and ends `run`."""
        timeout = self._service.config.drain_timeout
        until = monotonic() + timeout
        if self._grpc is not None:
            await self._grpc.stop(timeout)
        await self._service.stop(until)
        self._stop_listening()
        self._listener.close()  # what connects later is refused, not left to be reset
        await asyncio.sleep(_LAST_SECONDS)
        self._http.should_exit = True

    @property
    def _connections(self) -> list[DeadlineProtocol]:
        return list(self._http.server_state.connections)  # type: ignore[arg-type]

    async def _accept(self) -> None:
        if self._open:
            return
        self._open = True
        loop, http, protocol = asyncio.get_running_loop(), self._http, self._protocol

        def make() -> asyncio.Protocol:
            return protocol(config=self._config, server_state=http.server_state, app_state=http.lifespan.state)

        http.servers.append(await loop.create_server(make, sock=self._listener.dup(), backlog=_BACKLOG))
        if self._grpc_port is not None:
            from .grpc_server import start_grpc

            self._grpc = await start_grpc(self._service, self._service.config.host, self._grpc_port)

    async def _refuse(self) -> None:
        if not self._open:
            return
        self._open = False
        self._stop_listening()
        for connection in self._connections:
            connection.leave()
            connection.shutdown()
        if self._grpc is not None:
            await self._grpc.stop(0)
            self._grpc = None

    def _stop_listening(self) -> None:
        for server in self._http.servers:
            server.close()
        self._http.servers.clear()


class _HttpServer(uvicorn.Server):
    """Leaves the signals to the worker, which knows what else is to be ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield
