"""One process that serves: HTTP on a socket that it was given, and gRPC."""

import asyncio
import contextlib
import gc
import logging
import os
import pathlib
import resource
import signal
import socket
import sys
import threading

import jax

from jaxembed.cli.importing import import_modules

from . import logs
from .config import CONFIG_VARIABLE, MISTAKE, MISTAKE_STATUS, ServerConfig
from .doors import Doors
from .metrics import Metrics
from .peers import Peers
from .served import find_model
from .service import Service
from .versions import LOADER, Versions


async def serve(
    config: ServerConfig, metrics: Metrics, listener: socket.socket, grpc_port: int | None, supervisor: int
) -> None:
    """Serves until SIGTERM or SIGINT, and then answers what was admitted.

    Args:
      config: of the server.
      metrics: of this process.
      listener: bound, and listening.
      grpc_port: may be shared with other processes; None serves no gRPC.
      supervisor: pid of the process that started this one, and whose end is that of this one, too.
    """
    assert config.state is not None, "the supervisor names one"
    peers = Peers(config.state)
    service = Service(config, metrics, Versions(config, metrics, peers=peers))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    doors = Doors(
        service,
        peers,
        listener,
        grpc_port,
        predict_route=os.environ.get("AIP_PREDICT_ROUTE"),
        health_route=os.environ.get("AIP_HEALTH_ROUTE"),
    )
    with contextlib.suppress(OSError):  # then it is one that does not live long
        peers.begin()
    http = loop.create_task(doors.run())
    loading = loop.create_task(service.start())
    minding = loop.create_task(doors.mind(loading))
    ends = [http, loop.create_task(stop.wait()), loop.create_task(_orphaned(supervisor))]
    while not any(task.done() for task in ends):
        await asyncio.wait([*ends, *([] if minding.done() else [minding])], return_when=asyncio.FIRST_COMPLETED)
        if minding.done():
            minding.result()
    service.leaving = True
    with contextlib.suppress(OSError):  # others take this one for one that serves, until it is gone
        peers.withdraw()
    doors.leave()
    metrics.log.info("draining", extra={"admitted": service.admitted})
    if service.versions.current is not None:
        await asyncio.sleep(config.drain_grace)
    service.draining = True
    for task in (loading, minding, *ends[1:]):
        task.cancel()
    await asyncio.gather(loading, minding, return_exceptions=True)
    await doors.stop()
    await http
    metrics.log.info("stopped")


async def _orphaned(supervisor: int) -> None:
    """Returns once the supervisor is gone: without it, nobody would end this process."""
    while os.getppid() == supervisor:
        await asyncio.sleep(0.5)


def _import_modules(config: ServerConfig) -> None:
    """Ends the process if the command line names modules or a model that there are not; the supervisor says so."""
    assert config.state is not None, "the supervisor names one"
    try:
        import_modules(config.imports)
        if config.model is not None:
            find_model(config.model)
    except ValueError as e:
        (pathlib.Path(config.state) / MISTAKE).write_text(str(e), "utf-8")
        sys.exit(MISTAKE_STATUS)


def _end() -> None:
    """Ends the process though a version loads: nothing interrupts what compiles, and it may take minutes."""
    for thread in threading.enumerate():
        if thread.name.startswith(LOADER):
            thread.join(0.2)
            if thread.is_alive():
                logging.shutdown()
                os._exit(0)


def main() -> None:
    """What the supervisor starts: `python -m jaxembed.serve.server.worker FD GRPC_PORT SUPERVISOR SLOT`, the configuration in CONFIG_VARIABLE.

    Others may read the command line of a process, but not its environment, and a token is in it.
    """
    config = ServerConfig.from_json(os.environ.pop(CONFIG_VARIABLE))
    logs.configure()
    sys.path.append(os.getcwd())  # for --model and --import
    port, supervisor, slot = map(int, sys.argv[2:])
    # Batches run where they are called from: to hand them to another thread costs more than quick ones take. Arrays and
    # metrics that the modules make are of what is set before.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    metrics = Metrics(slot)
    _import_modules(config)
    # What loads a version beside the one that serves lets go of the interpreter after so long, instead of 5 ms.
    sys.setswitchinterval(0.0005)
    if config.tables == "memory":  # each of them is an open file
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The modules stay for good: without them a full collection, which stops all threads, is over in a moment.
    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=int(sys.argv[1]))
    serving = serve(config, metrics, listener, port if port >= 0 else None, supervisor)
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)
    _end()


if __name__ == "__main__":
    main()
