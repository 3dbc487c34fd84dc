"""`jaxembed serve` between states: while a version loads, when a worker comes back, and when it is told to end."""

import asyncio
import collections
import contextlib
import errno
import os
import shutil
import signal
import socket
import time

import httpx
import pytest

pytest.importorskip("uvicorn")

from jaxembed.serve.server import doors as doors_module
from jaxembed.serve.server.config import ENDING_SECONDS, ServerConfig
from jaxembed.serve.server.doors import Doors
from jaxembed.serve.server.metrics import Metrics
from jaxembed.serve.server.peers import Peers
from jaxembed.serve.server.service import Service
from jaxembed.serve.server.worker import serve
from tests.serve.server import bundles
from tests.serve.server.servers import Process, run, until

ROW = {"user": 1, "history": [2], "dense": [0.0, 0.0]}
PREDICT = "/v1/models/model:predict"
# Traced as slowly as a large model is, while a file is there.
SLOW_MODEL = """
import os, time
from tests.serve.server.bundles import model as quick

def model(params, activations, dense):
    while os.path.exists(os.environ["SLOW"]):
        time.sleep(0.1)
    return quick(params, activations, dense)
"""


@pytest.fixture
def slow(tmp_path):
    """(options, file): a server with these loads no version before the file is gone."""
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    file = tmp_path / "slow"
    file.touch()
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    environment = {"SLOW": str(file), "PYTHONPATH": path}
    yield {"environment": environment}, file
    file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_worker_that_cannot_load_what_others_serve_leaves_requests_to_them(folder, checkpoint):
    """The version that serves is gone from the folder, and a lower one is there: nobody goes back to it unnoticed."""
    bundles.add(checkpoint, folder, 1)
    with Process(folder, "--workers", 2) as server:
        server.wait_for(lambda: len(server.workers()) == 2)
        shutil.move(folder / "1", folder.parent / "aside")
        victim, survivor = server.workers()
        os.kill(victim, signal.SIGKILL)
        server.wait_for(lambda: "no version to serve yet" in [e["message"] for e in server.lines])
        counts = collections.Counter()
        with httpx.Client(headers={"connection": "close"}) as client:
            for _ in range(60):
                answer = client.post(server.url + PREDICT, json={"instances": [ROW]})
                counts[answer.status_code, answer.json().get("predictions", [{}])[0].get("version")] += 1
        assert counts == {(200, 1.0): 60}
        assert server.workers() == [survivor]
        (said,) = [e["reason"] for e in server.lines if e["message"] == "no version to serve yet"]
        assert "other workers serve version 1" in said
        shutil.move(folder.parent / "aside", folder / "1")
        server.wait_for(lambda: len(server.workers()) == 2)
        assert server.terminate() == 0


@pytest.mark.slow
def test_health_and_refusals_while_the_first_version_loads(shared_folder, slow):
    options, file = slow
    with (
        Process(shared_folder, "--model", "slow_model:model", wait=False, **options) as server,
        httpx.Client(timeout=20) as client,
    ):
        assert client.get(server.url + "/v2/health/live").status_code == 200
        ready = client.get(server.url + "/v2/health/ready")
        assert ready.status_code == 503
        refused = client.post(server.url + PREDICT, json={"instances": [ROW]})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        # Another worker may be ready first, and the next connection is for it.
        assert refused.headers["connection"] == "close"
        file.unlink()
        server.wait_for(server.workers)
        served = client.post(server.url + PREDICT, json={"instances": [ROW]})
        assert served.status_code == 200
        assert "connection" not in served.headers


@pytest.mark.slow
def test_sigterm_while_the_first_version_loads(shared_folder, slow):
    options, _ = slow
    with Process(shared_folder, "--model", "slow_model:model", wait=False, **options) as server:
        assert httpx.get(server.url + "/v2/health/live", timeout=20).status_code == 200
        time.sleep(1)  # it loads
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0  # what loads goes on for good
        assert [e["message"] for e in server.lines if e["message"] in ("stopped", "version switched")] == [
            "stopped"
        ]


@pytest.mark.slow
def test_sigterm_while_a_version_loads_beside_another(folder, checkpoint, slow):
    options, file = slow
    file.unlink()
    arguments = ("--model", "slow_model:model", "--drain-grace", 2)
    with Process(folder, *arguments, **options) as server:
        file.touch()
        # Of other types: the programs that there are do not fit.
        bundles.add(checkpoint, folder, 1, quantize="bfloat16")
        time.sleep(1.5)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: "draining" in [e["message"] for e in server.lines])
        answer = httpx.post(server.url + PREDICT, json={"instances": [ROW]}, timeout=2)
        assert answer.json()["predictions"][0]["version"] == 0.0
        assert server.process.wait(20) == 0
        assert "stopped" in [e["message"] for e in server.lines]
        assert all(e.get("version") != 1 for e in server.lines if e["message"] == "version switched")


def test_grpc_and_http_drain_in_one_time(tmp_path, monkeypatch):
    """Together with what ends after them, in less than the supervisor waits."""
    clock, waits = [100.0], []
    monkeypatch.setattr(doors_module, "monotonic", lambda: clock[0])

    class Grpc:
        async def stop(self, seconds):
            clock[0] += seconds

    async def check():
        service = Service(ServerConfig(str(tmp_path), drain_timeout=30.0))

        async def stop(until):
            waits.append(until)

        monkeypatch.setattr(service, "stop", stop)
        doors = Doors(service, Peers(tmp_path), socket.socket(), None)
        serving = asyncio.create_task(doors.run())
        assert await until(lambda: doors._http.started)
        doors._grpc = Grpc()
        await doors.stop()
        await serving
        assert doors._config.timeout_graceful_shutdown + doors_module._LAST_SECONDS < ENDING_SECONDS

    run(check())
    assert waits == [130.0]


def test_a_state_folder_that_fails_does_not_keep_a_worker_from_draining(tmp_path, monkeypatch):
    left = []

    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    async def leave(self):
        left.append("answered")

    monkeypatch.setattr(Peers, "_withdraw", fail)
    monkeypatch.setattr(Doors, "leave", lambda self: left.append("told"))
    monkeypatch.setattr(Doors, "stop", leave)
    monkeypatch.setattr(Doors, "run", lambda self: asyncio.sleep(0))
    config = ServerConfig(str(tmp_path), state=str(tmp_path / "state"))
    with socket.socket() as listener:
        run(serve(config, Metrics(), listener, None, supervisor=0))  # ended by that one's end
    assert left == ["told", "answered"]


def test_a_drain_that_has_no_time_left_waits_for_nobody(tmp_path):
    async def check():
        service = Service(ServerConfig(str(tmp_path), drain_timeout=3600.0))
        with service.admission():
            await service.stop(0.0)

    run(check())


@pytest.mark.slow
def test_connections_that_are_kept_are_let_go_while_a_worker_leaves(shared_folder):
    """A client that keeps its connection is told to take another one, and is not cut off at the end."""
    with Process(shared_folder, "--drain-grace", 1) as server, httpx.Client() as client:

        def send():
            return client.post(server.url + PREDICT, json={"instances": [ROW]})

        assert "connection" not in send().headers
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: "draining" in [e["message"] for e in server.lines])
        answers = [send()]
        with contextlib.suppress(httpx.TransportError):
            while True:
                answers.append(send())
        assert {answer.headers["connection"] for answer in answers} == {"close"}
        assert answers[0].status_code == 200
        assert server.process.wait(20) == 0
