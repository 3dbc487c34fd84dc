"""ServerConfig: everything that can be set about a server."""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
from importlib.machinery import PathFinder
from typing import Any

from jaxembed.serve.dense import DenseInputs
from jaxembed.serve.table_memory import TABLES

MEGABYTE = 1 << 20
#: That a worker has to end after grace and drain, before it is killed.
ENDING_SECONDS = 5
CONFIG_VARIABLE = "JAXEMBED_SERVER_CONFIG"
#: File of the shared folder, and exit status: how a worker tells that the command line is wrong.
MISTAKE, MISTAKE_STATUS = "mistake", 78


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a bundle is served.

    Attributes:
      bundles: folder of the versions of a bundle.
      name: of the model, in URLs.
      model: "MODULE:NAME" of `model(params, activations, dense)`; None serves the model that was exported into the
        bundle, or the embeddings of one without.
      imports: modules to import first, which register the combiners of the bundle.
      dense_inputs: by name, the shape of one row of the dense inputs of that model.
      weighted: paths of the features for which requests may carry weights, besides those that were exported so; with a
        `model`, these alone.
      max_ids_per_row: limit of ids of one row of one feature; None takes what was exported, or 128.
      tables: "mapped" from their files, or copied into "memory", on huge pages.
      max_batch_rows: rows that run at once.
      batch_wait_ms: how long a request may wait for others to run with, at most.
      batches_at_once: batches that run at a time in a worker, each on a thread; None takes the worker's share of the
        cores.
      max_queue_ms: how long requests may take in a worker that is overloaded: it admits as many as it answers in that time, or
        in three times what one takes alone, and `batch_wait_ms` besides. One that is not takes up to `max_queue_requests`.
      max_queue_requests: of a worker, requests that wait or run; more are refused. Over HTTP, as many bodies may be under way
        besides.
      max_queue_rows: rows that wait or run; more are refused, as are requests that have more themselves.
      max_body_bytes: of a request, also after it is decompressed; over gRPC 2 GiB - 1 at most.
      body_timeout: seconds in which the body of a request must arrive.
      idle_timeout: seconds in which a connection must send the headers of its next request, and in which it must
        read something of what it is sent.
      default_timeout: seconds after which a request is given up, and not run any more; it may name fewer, not more.
      drain_grace: seconds after SIGTERM in which requests are still taken, while readiness says no.
      drain_timeout: seconds that running requests have to end after that; workers are killed 5 s later.
      poll_seconds: how often the folder is looked at.
      verify: compare a version with its digests before it serves.
      host: address to listen at.
      http_port: 0 takes a free one.
      grpc_port: 0 takes a free one; None serves no gRPC.
      workers: processes.
      threads: of XLA in each of them, for one batch; None divides the cores among the workers. They spin for work
        before they sleep, so more of them than cores slow requests down.
      admin_token: what `Authorization: Bearer` must carry to switch versions; None allows this machine alone, whose
        requests must name it as localhost or by a loopback address.
      state: folder that the workers share, and no other server: the pinned version, their metrics and compiled programs.
      compile_cache: folder of compiled programs, so that the next start is fast; whoever can write it decides what
        is run. None takes one in `state`.

    Raises:
      ValueError: if a value is of no use.
    """

    bundles: str
    name: str = "model"
    model: str | None = None
    imports: tuple[str, ...] = ()
    dense_inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    weighted: tuple[str, ...] = ()
    max_ids_per_row: int | None = None
    tables: str = "mapped"
    max_batch_rows: int = 256
    batch_wait_ms: float = 0.0
    batches_at_once: int | None = None
    max_queue_ms: float = 3.0
    max_queue_requests: int = 512
    max_queue_rows: int = 8192
    max_body_bytes: int = 64 * MEGABYTE
    body_timeout: float = 10.0
    idle_timeout: float = 30.0
    default_timeout: float = 30.0
    drain_grace: float = 0.0
    drain_timeout: float = 30.0
    poll_seconds: float = 1.0
    verify: bool = True
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    workers: int = 1
    threads: int | None = None
    admin_token: str | None = None
    state: str | None = None
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", self.name):
            raise ValueError(f"name must be letters, digits, _ . and -, got {self.name!r}.")
        if self.model is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.model):
            raise ValueError(f"model must be MODULE:NAME, got {self.model!r}.")
        if self.model is not None and not _is_found(self.model.partition(":")[0]):
            raise ValueError(
                f"model is {self.model!r}, but there is no module {self.model.partition(':')[0]!r}; install it, or name "
                "its folder in PYTHONPATH."
            )
        if self.dense_inputs and self.model is None:
            raise ValueError(f"dense_inputs {list(self.dense_inputs)} need a model, got model=None.")
        DenseInputs(self.dense_inputs)  # checks them
        if self.admin_token is not None and not self.admin_token.strip():
            raise ValueError(
                f"admin_token is {self.admin_token!r}, which anyone may send; unset JAXEMBED_ADMIN_TOKEN, or give it a value."
            )
        if self.admin_token is not None and not (
            self.admin_token == self.admin_token.strip() and self.admin_token.isprintable()
        ):
            raise ValueError(
                "admin_token begins or ends with blanks or line ends, or holds one, which no header can carry; take them out of "
                "JAXEMBED_ADMIN_TOKEN (a secret made by `echo` ends with one)."
            )
        if self.tables not in TABLES:
            raise ValueError(f"tables must be one of {TABLES}, got {self.tables!r}.")
        for field in (
            "max_ids_per_row",
            "max_batch_rows",
            "batches_at_once",
            "max_queue_requests",
            "max_queue_rows",
            "max_body_bytes",
            "workers",
            "threads",
        ):
            value = getattr(self, field)
            if value is None and field in ("max_ids_per_row", "batches_at_once", "threads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an int of at least 1, got {value!r}.")
        if not _is_number(self.max_queue_ms) or not self.max_queue_ms > 0:
            raise ValueError(f"max_queue_ms must be milliseconds above 0, got {self.max_queue_ms!r}.")
        for field in ("body_timeout", "idle_timeout", "default_timeout", "drain_timeout", "poll_seconds"):
            if not _is_number(getattr(self, field)) or not getattr(self, field) > 0:
                raise ValueError(f"{field} must be seconds above 0, got {getattr(self, field)!r}.")
        for field in ("batch_wait_ms", "drain_grace"):
            value = getattr(self, field)
            if not _is_number(value) or value < 0:
                raise ValueError(f"{field} must be at least 0, got {value!r}.")
        for field in ("http_port", "grpc_port"):
            port = getattr(self, field)
            if port is None and field == "grpc_port":
                continue
            if not isinstance(port, int) or not 0 <= port < 65536:
                raise ValueError(f"{field} must be a port, got {port!r}.")
        for field in ("imports", "weighted"):
            object.__setattr__(self, field, tuple(getattr(self, field)))

    @property
    def directory(self) -> pathlib.Path:
        """Folder of the versions."""
        return pathlib.Path(self.bundles).expanduser().absolute()

    @property
    def compiled(self) -> pathlib.Path | None:
        """Folder of compiled programs, if there is one."""
        if self.compile_cache is not None:
            return pathlib.Path(self.compile_cache).expanduser().absolute()
        return None if self.state is None else pathlib.Path(self.state).absolute() / "compiled"

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ServerConfig":
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def _is_found(module: str) -> bool:
    top = module.partition(".")[0]
    # Workers look in the folder that they are started in, too.
    return top in sys.modules or PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
