"""Serves the versions of a bundle, the newest first, over HTTP and gRPC.

jaxembed serve bundles --workers 4
curl localhost:8000/v1/models/model:predict -d '{"instances": [{"user": 7, "history": [1, 2]}]}'

A new version beside the old one is verified, warmed up and switched to; rename it into the folder when it is whole,
or copy its manifest.json last. The page at / shows what is served,
/metrics is for Prometheus and /openapi.json for programs. Vertex AI's AIP_HTTP_PORT, AIP_HEALTH_ROUTE,
AIP_PREDICT_ROUTE and AIP_STORAGE_URI are obeyed.
"""

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence

from jaxembed.cli.importing import add_import
from jaxembed.serve.table_memory import TABLES

from . import logs
from .config import ServerConfig
from .workers import Supervisor

# Only workers import these; they would die of one that is missing, and be started again for ever.
for _package in (
    "google.protobuf",
    "grpc",
    "httptools",
    "orjson",
    "prometheus_client",
    "starlette",
    "uvicorn",
    "uvloop",
):
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


#: Options that are a number of ServerConfig: flag, field and help.
_NUMBERS = (
    ("max-batch-rows", "max_batch_rows", "rows that run at once"),
    ("batch-wait-ms", "batch_wait_ms", "how long a request waits for others to run with"),
    (
        *("max-queue-ms", "max_queue_ms"),
        "how long requests may take in an overloaded worker, which refuses more than it answers in that time",
    ),
    (
        *("max-queue-requests", "max_queue_requests"),
        "requests of a worker that wait or run, over which they are refused, also while it is not",
    ),
    ("max-queue-rows", "max_queue_rows", "rows that wait or run, and most of one request"),
    ("timeout", "default_timeout", "seconds that a request may take; it may name fewer"),
    (
        *("max-body-bytes", "max_body_bytes"),
        "of a request, also after it is decompressed; over gRPC 2 GiB - 1 at most",
    ),
    ("body-timeout", "body_timeout", "seconds in which the body of a request must arrive"),
    (
        *("idle-timeout", "idle_timeout"),
        "seconds in which a connection must send the next headers, and read its answers",
    ),
    ("drain-grace", "drain_grace", "seconds of service after SIGTERM"),
    ("drain-timeout", "drain_timeout", "seconds that running requests have to end after that"),
    ("poll-seconds", "poll_seconds", "seconds between two looks at the folder"),
    ("workers", "workers", "processes, one for each core that is to serve"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed serve`."""
    parser.add_argument("bundles", nargs="?", help="folder of the versions; default: AIP_STORAGE_URI")
    parser.add_argument("--name", default=ServerConfig.name, help="of the model, in URLs; default: %(default)s")
    parser.add_argument(
        "--model", metavar="MODULE:NAME", help="model(params, activations, dense); default: the exported one"
    )
    parser.add_argument(
        "--dense",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="a dense input and its size, such as 13 or 4,8",
    )
    add_import(parser)
    parser.add_argument(
        "--weighted",
        action="append",
        default=[],
        metavar="FEATURE",
        help="may carry weights, besides those exported so",
    )
    parser.add_argument("--max-ids-per-row", type=int, help="default: what was exported, or 128")
    parser.add_argument(
        "--tables",
        choices=TABLES,
        default=ServerConfig.tables,
        help="memory: copied once for all workers, on huge pages; slower to load, faster where files are cached on small pages; default: %(default)s",
    )
    parser.add_argument("--batches-at-once", type=int, help="of a worker; default: its share of the cores")
    for flag, field, what in _NUMBERS:
        default = getattr(ServerConfig, field)
        parser.add_argument(
            f"--{flag}", type=type(default), default=default, help=f"{what}; default: {default:.12g}"
        )
    parser.add_argument("--no-verify", action="store_true", help="do not compare versions with their digests")
    parser.add_argument(
        "--host", default=ServerConfig.host, help="default: %(default)s, and 0.0.0.0 where AIP_HTTP_PORT is set"
    )
    parser.add_argument("--http-port", type=int, help="default: AIP_HTTP_PORT, or 8000")
    parser.add_argument(
        "--grpc-port", type=int, default=ServerConfig.grpc_port, help="-1 for none; default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=int, help="of a worker, for one batch; default: its share of the cores"
    )
    parser.add_argument(
        "--state",
        help="folder for the pinned version and compiled programs, to outlive a restart; of this server alone",
    )
    parser.add_argument(
        "--compile-cache",
        metavar="FOLDER",
        help="for compiled programs alone; it must be as trusted as the program",
    )


def config_from(options: argparse.Namespace, environment: Mapping[str, str]) -> ServerConfig:
    """The configuration that the command line and Vertex AI's variables make up.

    Raises:
      ValueError: if they are of no use.
    """
    bundles = options.bundles or environment.get("AIP_STORAGE_URI")
    if not bundles:
        raise ValueError("name the folder of the versions, or set AIP_STORAGE_URI.")
    if "://" in bundles:
        raise ValueError(f"{bundles} must be mounted or copied first; bundles are mapped from local files.")
    port = options.http_port
    if port is None:
        port = _port(environment.get("AIP_HTTP_PORT", "8000"))
    # Vertex AI reaches the container from outside.
    host = "0.0.0.0" if "AIP_HTTP_PORT" in environment and options.host == "127.0.0.1" else options.host
    return ServerConfig(
        bundles=bundles,
        name=options.name,
        model=options.model,
        imports=tuple(options.imports),
        dense_inputs=_dense(options.dense),
        weighted=tuple(options.weighted),
        max_ids_per_row=options.max_ids_per_row,
        tables=options.tables,
        max_batch_rows=options.max_batch_rows,
        batch_wait_ms=options.batch_wait_ms,
        batches_at_once=options.batches_at_once,
        max_queue_ms=options.max_queue_ms,
        max_queue_requests=options.max_queue_requests,
        max_queue_rows=options.max_queue_rows,
        default_timeout=options.timeout,
        max_body_bytes=options.max_body_bytes,
        body_timeout=options.body_timeout,
        idle_timeout=options.idle_timeout,
        drain_grace=options.drain_grace,
        drain_timeout=options.drain_timeout,
        poll_seconds=options.poll_seconds,
        verify=not options.no_verify,
        host=host,
        http_port=port,
        grpc_port=None if options.grpc_port < 0 else options.grpc_port,
        workers=options.workers,
        threads=options.threads,
        admin_token=environment.get("JAXEMBED_ADMIN_TOKEN"),
        state=options.state,
        compile_cache=options.compile_cache,
    )


def run(options: argparse.Namespace) -> int:
    """Serves until SIGTERM."""
    logs.configure()
    return Supervisor(config_from(options, os.environ)).run()


def _dense(texts: Sequence[str]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        try:
            shape = [int(size) for size in sizes.split(",")] if sizes else []
        except ValueError:
            shape = [-1]
        if not name or min(shape, default=0) < 0:
            raise ValueError(f"--dense must be NAME=SIZE, such as dense=13 or dense=4,8, got {text!r}.")
        if name in shapes:
            raise ValueError(f"--dense names {name!r} twice, the second time as {text!r}; name it once.")
        shapes[name] = shape
    return shapes


def _port(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"AIP_HTTP_PORT must be a port, got {text!r}.")
    return int(text)
