"""Prometheus metrics of a server, summed over its worker processes."""

import bisect
import collections
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess, values

from .logs import logger
from .metric_files import MetricFiles

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_FILL = tuple(i / 10 for i in range(1, 11))
STAGES = ("read", "parse", "queue", "run", "write")
_RECENT = 600


class Refusals:
    """How many requests of a protocol were refused with 429 before they were read, since this was handed on."""

    __slots__ = ("count",)

    def __init__(self):
        self.count: int = 0


class Metrics:
    """Counts requests, and times the stages they go through.

    With PROMETHEUS_MULTIPROC_DIR in the environment, as the supervisor sets it, the values of all workers
    are summed up; a worker for whose values the disk has no room leaves them out.

    Args:
      worker: its number among them; the next one of that number counts on. None: a process that is none of them.
    """

    def __init__(self, worker: int | None = None):
        self.registry: prometheus.CollectorRegistry = prometheus.CollectorRegistry()
        self.log: logging.Logger = logger()
        self._files = self._make_files(worker)
        name = "jaxembed"
        options: dict[str, Any] = {"registry": self.registry}
        self._requests = prometheus.Counter(
            f"{name}_requests",
            "Requests, by protocol and status; 499: the client left.",
            ["protocol", "status"],
            **options,
        )
        self._latency = prometheus.Histogram(
            f"{name}_request_seconds", "Time in the server.", ["protocol"], buckets=_SECONDS, **options
        )
        self._stages = prometheus.Histogram(
            f"{name}_stage_seconds", "Time by stage.", ["stage"], buckets=_SECONDS, **options
        )
        self._fill = prometheus.Histogram(
            f"{name}_batch_fill", "Rows of a batch, of the most it may have.", buckets=_FILL, **options
        )
        self._batches = prometheus.Counter(f"{name}_batches", "Batches run.", **options)
        self._batched = prometheus.Counter(f"{name}_batched_requests", "Requests in them.", **options)
        self._rows = prometheus.Counter(f"{name}_rows", "Rows run.", **options)
        self._padding = prometheus.Counter(f"{name}_padding_rows", "Rows of padding run.", **options)
        self._bad_ids = prometheus.Counter(
            f"{name}_bad_ids", "Requests refused for an id, by feature.", ["feature"], **options
        )
        self._swaps = prometheus.Counter(
            f"{name}_version_changes", "Versions that were switched to, or failed.", ["result"], **options
        )
        gauge: dict[str, Any] = {"multiprocess_mode": "livemax", **options}
        self._version = prometheus.Gauge(f"{name}_version", "The version that serves.", **gauge)
        self._queued = prometheus.Gauge(
            f"{name}_queued_rows", "Rows that wait or run.", multiprocess_mode="livesum", **options
        )
        self._room = prometheus.Gauge(
            f"{name}_room_requests",
            "Requests that may wait or run, fewer in an overload.",
            multiprocess_mode="livesum",
            **options,
        )
        self._stage = {stage: _Tally(self._stages.labels(stage), _SECONDS) for stage in STAGES}
        self._filled = _Tally(self._fill, _FILL)
        self._latencies: dict[str, _Tally] = {}
        self._bad_features: set[str] = set()
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
        self._refusals: dict[str, Refusals] = {}
        self._run = collections.Counter[str]()
        #: (time, seconds) of the last requests of this worker, for the status page.
        self.recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)

    def request(self, protocol: str, status: int, seconds: float) -> None:
        """A request was answered, or given up with 499 as its client left."""
        self._counts[protocol, status] += 1
        if status < 400:
            tally = self._latencies.get(protocol)
            if tally is None:
                tally = self._latencies[protocol] = _Tally(self._latency.labels(protocol), _SECONDS)
            tally.observe(seconds)
            self.recent.append((time.time(), seconds))

    def refusals(self, protocol: str) -> Refusals:
        """Where those of a protocol are counted."""
        return self._refusals.setdefault(protocol, Refusals())

    def stage(self, stage: str, seconds: float) -> None:
        """A request went through a stage."""
        self._stage[stage].observe(seconds)

    def batch(self, seconds: float, requests: int, rows: int, computed: int, max_rows: int) -> None:
        """A batch was run."""
        self._stage["run"].observe(seconds)
        run = self._run
        run["batches"] += 1
        run["requests"] += requests
        run["rows"] += rows
        run["padding"] += max(computed - rows, 0)
        self._filled.observe(min(rows / max_rows, 1.0))

    def flush(self) -> None:
        """Hands on what was counted since the last time; on the thread that counts.

        The values that processes share cost microseconds each: too much for twenty of them in each request.
        """
        for tally in (*self._stage.values(), *self._latencies.values(), self._filled):
            tally.flush()
        for protocol, refusals in self._refusals.items():
            if refusals.count:
                self._counts[protocol, 429] += refusals.count
                refusals.count = 0
        for (protocol, status), count in self._counts.items():
            self._requests.labels(protocol, str(status)).inc(count)
        self._counts.clear()
        for name, counter in (
            ("batches", self._batches),
            ("requests", self._batched),
            ("rows", self._rows),
            ("padding", self._padding),
        ):
            if self._run[name]:
                counter.inc(self._run[name])
        self._run.clear()

    def bad_id(self, feature: str) -> None:
        """A request was refused for an id of this feature."""
        if feature not in self._bad_features:
            # The one label that may have any number of values.
            if self._files is not None and not self._files.has_room(feature):
                return
            self._bad_features.add(feature)
        self._bad_ids.labels(feature).inc()

    def version(self, version: int) -> None:
        """This version serves from now on."""
        self._swaps.labels("served").inc()
        self._version.set(version)

    def version_failed(self) -> None:
        """A version could not be loaded."""
        self._swaps.labels("failed").inc()

    def queued(self, rows: int, room: int) -> None:
        """So many rows wait or run, and so many requests may."""
        self._queued.set(rows)
        self._room.set(room)

    def text(self) -> bytes:
        """All metrics, in Prometheus' format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return prometheus.generate_latest(self.registry)
        registry = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return prometheus.generate_latest(registry)

    def _make_files(self, worker: int | None) -> MetricFiles | None:
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return None
        try:
            if worker is None:
                return MetricFiles(folder, os.getpid())
            files = MetricFiles(folder, worker)
            values.ValueClass = values.MultiProcessValue(lambda: worker)
            return files
        except OSError as e:
            values.ValueClass = values.MutexValue
            self.log.warning(
                "what this worker counts is missing in the metrics; make room, and start the server again",
                extra={"folder": folder, "reason": e.strerror},
            )
            return None


class _Tally:
    """Counts observations of a histogram, to be added to it many at a time."""

    def __init__(self, histogram: Any, bounds: Sequence[float]):
        self._histogram, self._bounds = histogram, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def flush(self) -> None:
        if not any(self._counts):
            return
        # Histograms have no way to add several at a time, but for the values that they are made of.
        for value, count in zip(self._histogram._buckets, self._counts, strict=True):
            if count:
                value.inc(count)
        self._histogram._sum.inc(self._sum)
        self._counts = [0] * len(self._counts)
        self._sum = 0.0
