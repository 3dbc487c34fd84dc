"""Starts a server in this process, on a thread, or `jaxembed serve` in processes of its own."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import httpx
import pytest
import uvloop

from jaxembed.serve.server.app import make_app
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.service import Service
from tests.serve.server import bundles


@contextlib.asynccontextmanager
async def client_of(folder, **options):
    """(client, service) of an application in this event loop, without sockets."""
    defaults = {"max_batch_rows": 8, "batches_at_once": 1, "poll_seconds": 0.02}
    config = ServerConfig(str(folder), **{**bundles.OPTIONS, **defaults, **options})
    service = Service(config)
    await service.start()
    transport = httpx.ASGITransport(make_app(service), client=("127.0.0.1", 1))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, service
    finally:
        await service.stop()


def free_port():
    """One that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])


def on(loop, coroutine):
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


def run(coroutine):
    return on(asyncio.new_event_loop, coroutine)


async def until(condition, seconds=10.0):
    """Whether `condition` came true in time."""
    for _ in range(int(seconds * 100)):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


@contextlib.contextmanager
def memory_without_collector():
    """What gives the bytes that Python's objects take, while nobody looks for cycles among them."""
    gc.disable()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()


def counts(service):
    """The lines of the metrics that count requests."""
    service.metrics.flush()
    lines = service.metrics.text().decode().splitlines()
    return {line for line in lines if line.startswith("jaxembed_requests_total")}


class Gate:
    """Holds the batches of a model, and counts their rows."""

    def __init__(self, model, monkeypatch):
        self.rows, self.running, self._run, self._open = 0, threading.Event(), model.run, threading.Event()
        monkeypatch.setattr(model, "run", self.run)

    def run(self, parts):
        self.running.set()
        assert self._open.wait(30)
        self.rows += sum(map(len, parts))
        return self._run(parts)

    def open(self):
        self._open.set()

    def close(self):
        self._open.clear()


class Process:
    """`jaxembed serve` with the model of `bundles`, its ports and its log."""

    def __init__(self, folder, *options, environment=None, port=0, wait=True, cwd=None):
        command = [
            sys.executable,
            "-P",
            "-c",
            "import sys; from jaxembed.cli import main; sys.exit(main())",
            "serve",
        ]
        command += [
            *([str(folder)] if folder else []),
            "--model",
            bundles.MODEL,
            "--dense",
            "dense=2",
            "--weighted",
            "history",
        ]
        command += [
            "--max-ids-per-row",
            "8",
            "--grpc-port",
            "0",
            "--poll-seconds",
            "0.05",
            "--max-batch-rows",
            "8",
        ]
        command += [] if port is None else ["--http-port", str(port)]
        self.lines = []
        self._listening, self._serving = threading.Event(), threading.Event()
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": "", **(environment or {})},
            cwd=cwd,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(60) or (wait and not self._serving.wait(60)):
            self.kill()
            raise RuntimeError(f"the server does not start: {self.lines}")

    def _read(self):
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"message": line}
            self.lines.append(entry)
            if entry["message"] == "listening":
                self.http_port, self.grpc_port = entry["http_port"], entry["grpc_port"]
                self._listening.set()
            if entry["message"] == "serving":
                self._serving.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http_port}"

    def workers(self):
        """Pids of the workers that serve."""
        dead = {entry["worker"] for entry in self.lines if entry["message"] == "a worker died"}
        return [
            entry["pid"] for entry in self.lines if entry["message"] == "serving" and entry["pid"] not in dead
        ]

    def wait_for(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"timed out; the log is {self.lines[-20:]}")
            time.sleep(0.02)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(20)
        self.process.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
