"""One process that serves: HTTP on a socket that it was given, and gRPC."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import jax
import uvicorn

from . import logs
from .app import make_app
from .config import CONFIG_VARIABLE, ServerConfig
from .http_protocol import DeadlineProtocol, make_protocol
from .service import Service


async def serve(config: ServerConfig, listener: socket.socket, grpc_port: int | None) -> None:
    """Serves until SIGTERM or SIGINT, and then answers what was admitted.

    Args:
      config: of the server.
      listener: bound, and listening.
      grpc_port: may be shared with other processes; None serves no gRPC.
    """
    service = Service(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    app = make_app(
        service,
        predict_route=os.environ.get("AIP_PREDICT_ROUTE"),
        health_route=os.environ.get("AIP_HEALTH_ROUTE"),
    )
    server = _HttpServer(_uvicorn_config(config, app, make_protocol(service)))
    # A worker that took the place of one that died leaves requests to the others until it can serve them.
    await service.start()
    http = loop.create_task(server.serve(sockets=[listener]))
    grpc = None
    if grpc_port is not None:
        from .grpc_server import start_grpc

        grpc = await start_grpc(service, config.host, grpc_port)
    service.metrics.log.info("serving", extra={"ready": service.ready, "port": listener.getsockname()[1]})
    orphaned = loop.create_task(_orphaned(os.getppid()))
    await asyncio.wait([http, loop.create_task(stopping.wait()), orphaned], return_when=asyncio.FIRST_COMPLETED)
    orphaned.cancel()
    service.leaving = True
    service.metrics.log.info("draining", extra={"admitted": service.admitted})
    await asyncio.sleep(config.drain_grace)
    service.draining = True
    if grpc is not None:
        await grpc.stop(config.drain_timeout)
    await service.stop()
    server.should_exit = True
    await http
    service.metrics.log.info("stopped")


async def _orphaned(parent: int) -> None:
    """Returns once the supervisor is gone: without it, nobody would end this process."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)


class _HttpServer(uvicorn.Server):
    """Leaves the signals to `serve`, which knows what else is to be ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _uvicorn_config(config: ServerConfig, app: object, protocol: type[DeadlineProtocol]) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.idle_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=5,
    )


def main() -> None:
    """What the supervisor starts: `python -m jaxembed.serve.server.worker FD GRPC_PORT`, the configuration in CONFIG_VARIABLE.

    Others may read the command line of a process, but not its environment, and a token is in it.
    """
    config = ServerConfig.from_json(os.environ.pop(CONFIG_VARIABLE))
    logs.configure()
    # Batches run where they are called from: to hand them to another thread costs more than quick ones take.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # What loads a version beside the one that serves lets go of the interpreter after so long, instead of 5 ms.
    sys.setswitchinterval(0.0005)
    if config.tables == "memory":  # each of them is an open file
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The modules stay for good: without them a full collection, which stops all threads, is over in a moment.
    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=int(sys.argv[1]))
    port = int(sys.argv[2])
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(config, listener, port if port >= 0 else None))
    else:
        uvloop.run(serve(config, listener, port if port >= 0 else None))


if __name__ == "__main__":
    main()
