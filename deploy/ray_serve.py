"""A Ray Serve application of a folder of versions: as many replicas as the load needs, on any number of machines.

    pip install '.[ray]'
    serve run deploy.ray_serve:app bundles=/bundles
    serve run deploy/ray_serve.yaml

Each replica is one server, without ports of its own: Ray's proxy takes the requests, and spreads them. Clients reach the
routes of `jaxembed serve`, over HTTP. What finds no room in a replica waits in the proxy, up to `max_queued_requests`;
further requests are answered 503 there. `/metrics`, `/status` and `/admin/` are those of one replica, whichever the proxy
takes: publish a version to switch all of them, and see Ray's own metrics.

Arguments:
  bundles: folder of the versions, on every machine.
  options: further options of `jaxembed serve`, in one string; those of ports and workers have no use. A replica has one
    thread, for one batch at a time; where it is given more cores (`num_cpus`), name as many with `--threads` and
    `--batches-at-once`. `--max-queue-ms` is 30000 here.

The admin token is JAXEMBED_ADMIN_TOKEN where the application is made: of `serve run`, or Ray's `runtime_env`.
"""

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace

from ray import serve
from starlette.applications import Starlette

from jaxembed.cli.importing import import_modules
from jaxembed.serve.server.app import make_app
from jaxembed.serve.server.command import add_arguments, config_from
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.service import Service

# Requests of one replica at a time: enough to fill batches, few enough to keep the wait short.
MAX_ONGOING_REQUESTS = 64
MAX_QUEUED_REQUESTS = 128


def app(arguments: Mapping[str, str]) -> serve.Application:
    """The application.

    Raises:
      ValueError: if an argument is unknown or of no use.
    """
    unknown = arguments.keys() - {"bundles", "options"}
    if unknown or "bundles" not in arguments:
        raise ValueError(f"arguments are bundles and options, got {sorted(arguments)}; write bundles=/folder.")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # What waits is counted, and more replicas started for it: it is not to be refused before.
    parser.set_defaults(max_queue_ms=30_000.0)
    options = parser.parse_args([arguments["bundles"], *shlex.split(arguments.get("options", ""))])
    environment = {name: value for name, value in os.environ.items() if name == "JAXEMBED_ADMIN_TOKEN"}
    config = config_from(options, environment)

    def build() -> Starlette:
        return application(config)

    deployment = serve.deployment(
        name="server",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 16},
        graceful_shutdown_timeout_s=config.drain_timeout,
    )
    return deployment(serve.ingress(build)()).bind()


def application(config: ServerConfig) -> Starlette:
    """What a replica runs: it has started once a version serves.

    Raises:
      ValueError: if a module that the options import cannot be.
    """
    # Ray gives a replica one core, and it sees all of the machine's, as the other replicas do.
    config = replace(config, threads=config.threads or 1, batches_at_once=config.batches_at_once or 1)
    os.environ["NPROC"] = str(config.threads)  # what XLA sizes its threads by; there is no option for it
    import_modules(config.imports)
    return make_app(Service(config), lifespan=True)
