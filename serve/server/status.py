"""The status page for people, and the data that it shows."""

import functools
import importlib.resources
import os
import time
from typing import Any

from .service import Service


@functools.cache
def page() -> bytes:
    """The page, in HTML."""
    return importlib.resources.files(__package__ or "").joinpath("page.html").read_bytes()


def status(service: Service) -> dict[str, Any]:
    """What this worker serves and how it fares."""
    versions, model = service.versions, service.versions.current
    return {
        "name": service.config.name,
        "pid": os.getpid(),
        "ready": service.ready,
        "time": time.time(),
        "version": None if model is None else model.version,
        "digest": None if model is None else model.digest,
        "loaded_seconds": None if model is None else model.loaded_seconds,
        "pinned": versions.pinned,
        "available": list(versions.available()),
        "failed": {str(version): reason for version, reason in versions.failed.items()},
        "admitted": service.admitted,
        "queued_rows": service.batcher.queued_rows,
        "tables": []
        if model is None
        else [
            {"name": t.name, "rows": t.shape[0], "dim": t.shape[1], "dtype": t.dtype, "bytes": t.num_bytes}
            for t in model.tables
        ],
        "example": None if model is None else example(model),
        "latency": [[round(at, 3), round(seconds * 1e3, 4)] for at, seconds in service.metrics.recent],
    }


def example(model: Any) -> dict[str, Any]:
    """A request of one row that the model takes: an id of every feature, 0 where it is one."""
    row: dict[str, Any] = {}
    for path, feature in model.signature.features.items():
        preprocessing = feature.config.preprocessing
        row[path] = [0 if preprocessing is None else preprocessing.example_id]
    for name, shape in model.signature.dense.items():
        value: Any = 0.0
        for size in reversed(shape):
            value = [value] * size
        row[name] = value
    return {"instances": [row]}
