"""`jaxembed serve` in processes of its own: public clients, limits on sockets, death and drain."""

import gzip
import json
import os
import pathlib
import signal
import socket
import time
from typing import ClassVar

import httpx
import numpy as np
import pytest

from jaxembed.serve.server.cores import cores_of_worker
from jaxembed.serve.server.messages import METHODS
from tests.serve.server import bundles
from tests.serve.server.servers import Process, free_port

ROW = {"user": 1, "history": [2], "dense": [0.0, 0.0]}
GOOD = {"history": 2.0, "user": 1.0, "version": 0.0}
PREDICT, INFER = "/v1/models/model:predict", "/v2/models/model/infer"
BOTH = pytest.mark.parametrize("path", [PREDICT, INFER])


@pytest.fixture(scope="module")
def server(shared_folder):
    options = ("--body-timeout", 1, "--idle-timeout", 1, "--max-queue-requests", 4, "--max-queue-rows", 64)
    with Process(shared_folder, *options) as process:
        yield process


@pytest.fixture
def healthy(server):
    """The server serves after the test as it did before."""
    yield server
    while Raw.opened:
        Raw.opened.pop().socket.close()
    for _ in range(50):
        answer = httpx.post(server.url + PREDICT, json={"instances": [ROW]})
        if answer.status_code != 429:  # the room of clients that went away may take a moment to be free
            break
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == [GOOD]
    assert server.process.poll() is None


class Raw:
    """A connection on which anything can be sent; closed after the test."""

    opened: ClassVar[list] = []

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.http_port), timeout=20)
        self.opened.append(self)

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else data.encode())

    def status(self):
        """Of the answer; None if the server closes without one."""
        head = b""
        while b"\r\n\r\n" not in head:
            try:
                part = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not part:
                return None
            head += part
        return int(head.split()[1])

    def post(self, body=b"", path=PREDICT, **headers):
        lines = [f"POST {path} HTTP/1.1", "Host: x"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def test_tritonclient_http(healthy):
    triton = pytest.importorskip("tritonclient.http")
    with triton.InferenceServerClient(f"127.0.0.1:{healthy.http_port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("model")
        assert client.is_model_ready("model", "0")
        assert client.get_server_metadata()["name"] == "jaxembed"
        assert client.get_model_metadata("model")["versions"] == ["0"]
        for binary in (False, True):
            for compression in (None, "gzip", "deflate"):
                inputs = triton_inputs(triton, binary)
                result = client.infer(
                    "model",
                    inputs,
                    request_id="7",
                    outputs=[triton.InferRequestedOutput("user", binary_data=binary)],
                    request_compression_algorithm=compression,
                )
                np.testing.assert_array_equal(result.as_numpy("user"), np.float32([3, 4]))
                assert result.get_response()["id"] == "7"
            check_triton(client.infer("model", triton_inputs(triton, binary)))
        bad = triton_inputs(triton)
        bad[0].set_data_from_numpy(np.array([3, 99]))
        with pytest.raises(triton.InferenceServerException, match=r"id 99 is outside"):
            client.infer("model", bad)


def test_tritonclient_grpc(healthy):
    triton = pytest.importorskip("tritonclient.grpc")
    with triton.InferenceServerClient(f"127.0.0.1:{healthy.grpc_port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("model")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata().name == "jaxembed"
        assert [i.name for i in client.get_model_metadata("model").inputs][-1] == "dense"
        check_triton(client.infer("model", triton_inputs(triton), request_id="7"))
        result = client.infer("model", triton_inputs(triton), outputs=[triton.InferRequestedOutput("user")])
        assert result.as_numpy("history") is None
        bad = triton_inputs(triton)
        bad[0].set_data_from_numpy(np.array([3, 99]))
        cases = [
            (lambda: client.infer("model", bad), "INVALID_ARGUMENT.*id 99 is outside"),
            (lambda: client.infer("model", triton_inputs(triton)[1:]), "INVALID_ARGUMENT.*'user' is missing"),
            (lambda: client.infer("other", triton_inputs(triton)), "NOT_FOUND.*'other' is not served"),
            (lambda: client.infer("model", triton_inputs(triton), model_version="9"), "NOT_FOUND.*'9'"),
            (lambda: client.get_model_metadata("other"), "NOT_FOUND"),
            (lambda: client.infer("model", triton_inputs(triton), timeout=1), "(?i)deadline"),
        ]
        for call, message in cases:
            with pytest.raises(triton.InferenceServerException, match=message):
                call()


def triton_inputs(triton, binary=None):
    arrays = {
        "user": np.array([3, 4]),
        "history": np.array([1, 2, 3]),
        "history.row_splits": np.array([0, 3, 3], np.int32),
        "dense": np.float32([[0, 1], [2, 3]]),
    }
    found = []
    for name, array in arrays.items():
        datatype = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}[array.dtype.name]
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, *(() if binary is None else (binary,)))
        found.append(tensor)
    return found


def check_triton(result):
    want = bundles.expected(0, [3, 4], [[1, 2, 3], []], dense=[[0, 1], [2, 3]])
    for name, value in want.items():
        np.testing.assert_allclose(result.as_numpy(name), value, rtol=1e-6)


def test_grpc_bytes_that_are_no_message(healthy):
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(f"127.0.0.1:{healthy.grpc_port}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for data in (b"\xff" * 50, b"\0" * 100, b""):
            with pytest.raises(grpc.RpcError) as caught:
                method(data)
            assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_grpc_of_too_many_rows(healthy):
    grpc = pytest.importorskip("grpc")
    message = METHODS["ModelInfer"][0](model_name="model")
    for name in ("user", "history"):
        message.inputs.add(name=name, datatype="INT64", shape=[65, 0])
        message.raw_input_contents.append(b"")
    message.inputs.add(name="dense", datatype="FP32", shape=[65, 2])
    message.raw_input_contents.append(bytes(65 * 8))
    with grpc.insecure_channel(f"127.0.0.1:{healthy.grpc_port}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError, match="at most 64 rows, got 65") as caught:
            method(message.SerializeToString())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@BOTH
def test_bodies_that_are_too_much(healthy, path):
    bomb = gzip.compress(b"\0" * (256 << 20), 9)
    answer = httpx.post(healthy.url + path, content=bomb, headers={"content-encoding": "gzip"}, timeout=20)
    assert answer.status_code == 413
    for encoding, status in (("br", 415), ("gzip", 400)):
        answer = httpx.post(healthy.url + path, content=b"{}", headers={"content-encoding": encoding})
        assert answer.status_code == status
    announced = Raw(healthy)
    announced.post(path=path, Content_Length=65 << 20)
    assert announced.status() == 413
    flood = Raw(healthy)
    flood.post(path=path, Transfer_Encoding="chunked")
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    sent, status = 0, None
    try:
        for _ in range(200):
            flood.send(chunk)
            sent += 1
    except OSError:
        pass  # closed on us, as it should be
    else:
        status = flood.status()
    assert status in (413, None)
    assert sent < 200 or status == 413


def test_bodies_and_headers_that_are_slow_or_wrong(healthy):
    slow = Raw(healthy)
    slow.post(b"{", Content_Length=100)
    begin = time.monotonic()
    assert slow.status() == 408
    assert 0.5 < time.monotonic() - begin < 10
    for start in (b"", b"POST /v1 HT", f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n".encode()):
        silent = Raw(healthy)
        silent.send(start)
        begin = time.monotonic()
        assert silent.status() is None
        assert time.monotonic() - begin < 10
    drip = Raw(healthy)
    begin = time.monotonic()
    assert drip_until_closed(drip)
    assert time.monotonic() - begin < 10
    body = json.dumps({"instances": [ROW]}).encode()
    for path in (PREDICT, INFER):
        short = Raw(healthy)  # says less than it sends: the rest is no request
        short.post(body, path=path, Content_Length=len(body) - 5)
        assert short.status() == 400
        for wrong in ("-1", "x", "1e3", ""):
            odd = Raw(healthy)
            odd.post(body, path=path, Content_Length=wrong)
            assert odd.status() == 400
    garbage = Raw(healthy)
    garbage.send(b"\0\xff\r\n\r\n")
    assert garbage.status() == 400


def drip_until_closed(connection):
    for byte in b"GET / HTTP/1.1\r\nX-Slow: " + b"a" * 1000:
        try:
            connection.send(bytes([byte]))
        except OSError:
            return True
        time.sleep(0.05)
    return False


@BOTH
def test_clients_that_go_away(healthy, path):
    for body in (b"{", json.dumps({"instances": [ROW]}).encode()):
        for _ in range(5):
            gone = Raw(healthy)
            gone.post(body, path=path, Content_Length=max(len(body), 50), Inference_Header_Content_Length=1)
            gone.socket.close()
    assert httpx.get(healthy.url + "/v2/health/live").status_code == 200


def test_a_deadline_that_passed(healthy):
    answer = httpx.post(
        healthy.url + PREDICT, json={"instances": [ROW]}, headers={"x-request-timeout-ms": "0.000001"}
    )
    assert answer.status_code == 504
    for wrong in ("x", "-1", "nan", "inf"):
        answer = httpx.post(
            healthy.url + PREDICT, json={"instances": [ROW]}, headers={"x-request-timeout-ms": wrong}
        )
        assert answer.status_code == 400


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["mapped", "memory"])
def test_a_worker_that_is_killed_comes_back(shared_folder, tables):
    """New connections are served all the while by the other one."""
    with Process(shared_folder, "--workers", 2, "--tables", tables) as server:
        server.wait_for(lambda: len(server.workers()) == 2)
        victim, survivor = server.workers()
        os.kill(victim, signal.SIGKILL)
        failed, served = 0, 0
        with httpx.Client(headers={"connection": "close"}) as client:
            until = time.monotonic() + 60
            while len(server.workers()) < 2 or victim in server.workers():
                assert time.monotonic() < until
                try:
                    answer = client.post(server.url + PREDICT, json={"instances": [ROW]})
                    served += answer.json()["predictions"] == [GOOD]
                except httpx.TransportError:
                    failed += 1  # accepted by the victim, and gone with it
        assert survivor in server.workers()
        assert served > 10
        assert failed <= 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_workers_have_the_threads_they_were_given_or_their_share(shared_folder):
    def threads(*options):
        with Process(shared_folder, *options) as server:
            (worker,) = server.workers()
            return sum(
                "XLAEigen" in name.read_text() for name in pathlib.Path(f"/proc/{worker}/task").glob("*/comm")
            )

    assert threads("--threads", 5) == 5
    assert threads() == cores_of_worker(1)


@pytest.mark.slow
def test_workers_end_with_their_supervisor(shared_folder):
    with Process(shared_folder) as server:
        (worker,) = server.workers()
        server.process.kill()
        server.process.wait()
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{worker}"):
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.slow
def test_drain_on_sigterm(shared_folder):
    with Process(shared_folder, "--workers", 2, "--batch-wait-ms", 500, "--drain-grace", 2) as server:
        server.wait_for(lambda: len(server.workers()) == 2)
        body = json.dumps({"instances": [ROW]}).encode()
        connections = [Raw(server) for _ in range(6)]
        for connection in connections:
            connection.post(body, Content_Length=len(body))
        time.sleep(0.2)  # all wait for others to join them
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: [e["message"] for e in server.lines].count("draining") == 2)
        # Whoever sends requests here learns that it should not, and is served until it does.
        assert httpx.get(server.url + "/v2/health/ready").status_code == 503
        assert httpx.post(server.url + PREDICT, json={"instances": [ROW]}).status_code == 200
        assert [connection.status() for connection in connections] == [200] * 6
        assert server.process.wait(30) == 0
        assert [entry["message"] for entry in server.lines].count("stopped") == 2
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/v2/health/ready")
        while Raw.opened:
            Raw.opened.pop().socket.close()


@pytest.mark.slow
def test_vertex_variables(shared_folder):
    environment = {
        "AIP_HTTP_PORT": str(free_port()),
        "AIP_HEALTH_ROUTE": "/healthz",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_STORAGE_URI": str(shared_folder),
    }
    with Process(None, environment=environment, port=None) as server:
        assert str(server.http_port) == environment["AIP_HTTP_PORT"]
        assert httpx.get(server.url + "/healthz").status_code == 200
        answer = httpx.post(server.url + "/predict", json={"instances": [ROW], "parameters": {}})
        assert answer.json()["predictions"] == [GOOD]


@pytest.mark.slow
def test_metrics_are_those_of_all_workers(shared_folder):
    def count():
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        wanted = 'jaxembed_requests_total{protocol="tf_rest",status="200"'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))

    with Process(shared_folder, "--workers", 2) as server:
        server.wait_for(lambda: len(server.workers()) == 2)
        for _ in range(30):
            answer = httpx.post(server.url + PREDICT, json={"instances": [ROW]})
            assert answer.status_code == 200
        # Workers hand on what they counted five times a second.
        server.wait_for(lambda: count() == 30)


@pytest.mark.slow
def test_a_version_that_is_activated_is_soon_that_of_all_workers(shared_folder, checkpoint, tmp_path):
    """Whichever is asked; the others follow as they look at the folder, here every 0.05 s."""
    for version in (1, 2):
        bundles.add(checkpoint, tmp_path / "bundles", version)

    def serving():
        """The version of each worker, by process."""
        switched = [entry for entry in server.lines if entry["message"] == "version switched"]
        return {entry["pid"]: entry["version"] for entry in switched}

    with Process(tmp_path / "bundles", "--workers", 2) as server:
        server.wait_for(lambda: len(server.workers()) == 2)
        workers = set(server.workers())
        assert serving() == dict.fromkeys(workers, 2)
        for path, version in (("versions/1:activate", 1), ("versions:latest", 2), ("versions/1:activate", 1)):
            answer = httpx.post(f"{server.url}/admin/{path}")
            assert answer.status_code == 200
            assert answer.json()["version"] == version  # the worker that was asked serves it by now
            server.wait_for(lambda version=version: serving() == dict.fromkeys(workers, version), 20)
            for _ in range(20):  # connections of their own, for which the system chooses the worker
                row = httpx.post(server.url + PREDICT, json={"instances": [ROW]}).json()["predictions"][0]
                assert row == {"history": 2.0, "user": 1000.0 * version + 1, "version": version}


def test_what_lies_in_the_working_folder_hides_no_package(shared_folder, tmp_path):
    """In a clone that holds `jaxembed/` without its parts, workers once took that for the package; models are found there."""
    (tmp_path / "uvicorn.py").write_text("raise ImportError('this is not uvicorn')")
    (tmp_path / "mine.py").write_text(
        "def model(params, activations, dense):\n    return activations['user'][:, 0] + 0.5\n"
    )
    with Process(shared_folder, "--model", "mine:model", cwd=tmp_path) as server:
        body = {"instances": [{"user": 3, "history": [1], "dense": [0.0, 0.0]}]}
        answer = httpx.post(f"{server.url}/v1/models/model:predict", json=body)
        assert answer.json() == {"predictions": [3.5]}
