"""gRPC in this process: calls that end otherwise than with an answer."""

import asyncio
import contextlib
import json
import socket

import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc

from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.grpc_server import start_grpc
from jaxembed.serve.server.messages import METHODS
from tests.serve.server.servers import Gate, client_of, counts, memory_without_collector, run, until


@contextlib.asynccontextmanager
async def calling(folder, channel_options=(), **options):
    """(ModelInfer, service)"""
    # Held as the supervisor holds it, so that nobody takes it meanwhile.
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        async with client_of(folder, **options) as (_, service):
            server = await start_grpc(service, "127.0.0.1", port)
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options) as channel:
                    yield channel.unary_unary("/inference.GRPCInferenceService/ModelInfer"), service
            finally:
                await server.stop(0)


def request(outputs=()):
    message = METHODS["ModelInfer"][0](model_name="model")
    for name, array in {
        "user": np.array([1]),
        "history": np.array([[2]]),
        "dense": np.zeros((1, 2), np.float32),
    }.items():
        kind = {"int64": "INT64", "float32": "FP32"}[array.dtype.name]
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message.SerializeToString()


def test_calls_that_were_cancelled_are_counted_and_not_run(shared_folder, monkeypatch):
    async def check():
        async with calling(shared_folder) as (infer, service):
            gate = Gate(service.versions.current, monkeypatch)
            try:
                first = infer(request())
                assert await until(gate.running.is_set)
                second = infer(request())
                assert await until(lambda: service.batcher.queued_rows == 2)
                second.cancel()
                assert await until(lambda: service.admitted == 1)
            finally:
                gate.open()
            assert await asyncio.wait_for(first, 10)
            assert await until(lambda: service.batcher.queued_rows == 0)
            assert gate.rows == 1
            assert counts(service) == {
                'jaxembed_requests_total{protocol="v2_grpc",status="200"} 1.0',
                'jaxembed_requests_total{protocol="v2_grpc",status="499"} 1.0',
            }

    run(check())


def test_an_output_is_not_asked_for_twice(shared_folder):
    async def check():
        async with calling(shared_folder) as (infer, _):
            await infer(request(["user", "history"]))
            with pytest.raises(grpc.RpcError) as caught:
                await infer(request(["user", "history", "user"]))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "output 'user' is there twice."

    run(check())


def test_calls_that_end_in_an_error_of_ours_are_counted(shared_folder, monkeypatch):
    async def check():
        async with calling(shared_folder) as (infer, service):
            monkeypatch.setattr(service, "infer", None)
            with pytest.raises(grpc.RpcError) as caught:
                await infer(request())
            assert caught.value.code() == grpc.StatusCode.UNKNOWN
            assert counts(service) == {'jaxembed_requests_total{protocol="v2_grpc",status="500"} 1.0'}

    run(check())


@pytest.mark.parametrize("character", ["x", "\u00e9", "\U0001f600"])
def test_errors_of_long_texts_are_cut(shared_folder, monkeypatch, character):
    """Clients take 8 KiB, and would say RESOURCE_EXHAUSTED instead."""

    async def refuse(*_, **__):
        raise RequestError(400, character * 6000)

    async def check():
        async with calling(shared_folder) as (infer, service):
            monkeypatch.setattr(service, "infer", refuse)
            with pytest.raises(grpc.RpcError) as caught:
                await infer(request())
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == character * (2400 // len(character.encode())) + "..."

    run(check())


@pytest.mark.parametrize("lacks", [{}, {"max_queue_rows": 1}])
def test_clients_may_send_calls_again(shared_folder, monkeypatch, lacks):
    """As gRPC does by itself, of a status that comes alone: after the head of an answer the call would be settled."""
    policy = {
        "name": [{"service": "inference.GRPCInferenceService"}],
        "retryPolicy": {
            **{"maxAttempts": 4, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1},
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        },
    }
    options = [("grpc.service_config", json.dumps({"methodConfig": [policy]}))]

    async def check():
        async with calling(shared_folder, channel_options=options, **lacks) as (infer, service):
            gate = Gate(service.versions.current, monkeypatch)
            if lacks:
                first = infer(request())
                assert await until(gate.running.is_set)
            else:
                service.draining = True
            with pytest.raises(grpc.RpcError) as caught:
                await infer(request())
            service.draining = False
            gate.open()
            if lacks:
                await first
            assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
            status = 429 if lacks else 503
            assert f'jaxembed_requests_total{{protocol="v2_grpc",status="{status}"}} 4.0' in counts(service)

    run(check())


def test_a_timeout_that_never_comes(shared_folder):
    async def check():
        async with calling(shared_folder, default_timeout=1e300) as (infer, _):
            await infer(request())

    run(check())


@pytest.mark.parametrize(("size", "said"), [(20_000, "-5"), (600_000, "-5"), (600_000, "no memory")])
def test_messages_of_calls_that_end_in_an_error_are_let_go(shared_folder, monkeypatch, size, said):
    """At once, and not when cycles are looked for."""

    def lacks(reader, body):
        raise MemoryError

    if said == "no memory":
        monkeypatch.setattr("jaxembed.serve.server.v2_grpc.read_natively", lacks)
    message = METHODS["ModelInfer"][0].FromString(request())
    message.parameters["x"].string_param = "y" * size
    message.raw_input_contents[0] = np.array([-5]).tobytes()
    sent = message.SerializeToString()

    async def check():
        async with calling(shared_folder) as (infer, _):
            held = []
            for _ in range(40):
                with pytest.raises(grpc.RpcError, match=said):
                    await infer(sent)
                held.append(taken())
            assert max(held) - held[3] < 30 * len(sent)  # what gRPC keeps of 36 calls is less

    with memory_without_collector() as taken:
        run(check())


def test_a_limit_of_bodies_beyond_what_grpc_counts(shared_folder):
    async def check():
        async with calling(shared_folder, max_body_bytes=2**31) as (infer, _):
            await infer(request())

    run(check())


def test_calls_that_wait_to_be_accepted_are_not_cancelled_before_their_deadline(shared_folder, monkeypatch):
    """gRPC does so after 30 s, whatever deadline the server has, and says that the client did."""
    options, make = {}, grpc.aio.server

    def server(**arguments):
        options.update(arguments["options"])
        return make(**arguments)

    monkeypatch.setattr(grpc.aio, "server", server)

    async def check():
        async with calling(shared_folder) as (infer, service):
            await infer(request())
            assert options["grpc.server_max_unrequested_time_in_server"] > service.config.default_timeout

    run(check())


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_queue_requests": 1}, "1 requests are served or wait already"),
        ({"max_queue_rows": 1}, "the server is overloaded"),
    ],
)
def test_a_full_server_says_when_to_send_a_call_again(shared_folder, monkeypatch, limit, message):
    async def check():
        async with calling(shared_folder, **limit) as (infer, service):
            gate = Gate(service.versions.current, monkeypatch)
            try:
                first = infer(request())
                assert await until(gate.running.is_set)
                with pytest.raises(grpc.RpcError, match=message) as caught:
                    await infer(request())
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
            finally:
                gate.open()
            await first
            await infer(request())
            assert counts(service) == {
                'jaxembed_requests_total{protocol="v2_grpc",status="200"} 2.0',
                'jaxembed_requests_total{protocol="v2_grpc",status="429"} 1.0',
            }

    run(check())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("size", [100_001, 32 << 20])
def test_messages_over_the_limit(shared_folder, size, compression):
    """Those of zeros are a few bytes until they are unpacked."""

    async def check():
        async with calling(shared_folder, max_body_bytes=100_000) as (infer, service):
            with pytest.raises(grpc.RpcError, match=r"(?i)message larger than max") as caught:
                await infer(bytes(size), compression=compression)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "retry-after" not in dict(caught.value.trailing_metadata())
            assert service.admitted == 0
            await infer(request(), compression=compression)

    run(check())
