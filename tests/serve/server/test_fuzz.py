"""Fuzz: no crash, no 5xx other than 503, and no wrong answer to the good requests mixed in."""

import asyncio
import os

import pytest

pytest.importorskip("grpc")

import grpc

from jaxembed.serve.server.grpc_server import Methods
from jaxembed.serve.server.messages import METHODS
from tests.serve.server import fuzz
from tests.serve.server.servers import Process, client_of, run

ALLOWED = {200, 400, 413, 415, 503}
# 100,000 in the long run, and a few hundred in every run.
MANY = int(os.environ.get("JAXEMBED_FUZZ_REQUESTS", "100000"))


class Context:
    """What a method needs of gRPC."""

    code, details = "OK", ""

    def time_remaining(self):
        return None

    def set_trailing_metadata(self, metadata):
        pass

    async def abort(self, code, details):
        self.code, self.details = code.name, details
        raise grpc.aio.AbortError


def test_http(shared_folder):
    async def check():
        rng, seen = fuzz.seeded(0), set()
        async with client_of(shared_folder) as (client, _):
            for number in range(300):
                path, body, headers = fuzz.http_case(rng)
                answer = await client.post(path, content=body, headers=headers)
                seen.add(answer.status_code)
                assert answer.status_code in ALLOWED, (number, answer.status_code, body)
                assert answer.status_code == 200 or answer.json()["error"]
                if number % 10 == 0:
                    path, body, headers = fuzz.good_http(rng)
                    answer = await client.post(path, content=body, headers=headers)
                    assert fuzz.http_outputs(answer) == fuzz.WANT, body
        assert {200, 400} <= seen  # the mutations are neither all bad nor all harmless

    run(check())


def test_grpc(shared_folder):
    async def check():
        rng, seen = fuzz.seeded(1), set()
        async with client_of(shared_folder) as (_, service):
            methods = Methods(service)
            for number in range(300):
                data = fuzz.grpc_case(rng)
                context = Context()
                assert (await methods.ModelInfer(data, context) is None) == (context.code != "OK")
                seen.add(context.code)
                if number % 10 == 0:
                    good = fuzz.good_message(rng, raw=number % 20 == 0).SerializeToString()
                    assert fuzz.grpc_outputs(await methods.ModelInfer(good, Context())) == fuzz.WANT
        assert (
            {"OK", "INVALID_ARGUMENT"} <= seen <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
        )

    run(check())


@pytest.mark.slow
def test_many_over_sockets(shared_folder):
    """Both protocols at once, on a server of its own, which lives on."""
    grpc = pytest.importorskip("grpc")
    httpx = pytest.importorskip("httpx")
    codes = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}

    async def http(server, seed, count):
        rng = fuzz.seeded(seed)
        async with httpx.AsyncClient(timeout=30) as client:
            for number in range(count):
                path, body, headers = fuzz.http_case(rng)
                answer = await client.post(server.url + path, content=body, headers=headers)
                assert answer.status_code in ALLOWED, (answer.status_code, body)
                if number % 50 == 0:
                    path, body, headers = fuzz.good_http(rng)
                    answer = await client.post(server.url + path, content=body, headers=headers)
                    assert fuzz.http_outputs(answer) == fuzz.WANT, body

    async def rpc(server, seed, count):
        rng = fuzz.seeded(seed)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for number in range(count):
                call = method(fuzz.grpc_case(rng))
                code, details = await call.code(), await call.details()
                assert code.name in codes, details
                if number % 50 == 0:
                    answer = await method(fuzz.good_message(rng, raw=number % 100 == 0).SerializeToString())
                    assert fuzz.grpc_outputs(METHODS["ModelInfer"][1].FromString(answer)) == fuzz.WANT

    async def everything(server):
        each = MANY // 8
        await asyncio.gather(
            *(http(server, seed, each) for seed in range(4)), *(rpc(server, 4 + s, each) for s in range(4))
        )

    # A machine that stands still for some seconds is no late body.
    patient = [part for name in ("--timeout", "--body-timeout", "--idle-timeout") for part in (name, 600)]
    with Process(shared_folder, *patient) as server:
        asyncio.run(everything(server))
        assert not [entry for entry in server.lines if entry["message"] == "a worker died"]
        assert not [entry for entry in server.lines if "traceback" in entry]


@pytest.mark.slow
def test_schemathesis(shared_folder):
    """What the OpenAPI page says is what the server does."""
    schemathesis = pytest.importorskip("schemathesis")
    checks = pytest.importorskip("schemathesis.specs.openapi.checks")
    hypothesis = pytest.importorskip("hypothesis")
    # A schema cannot say that lengths agree and ids are in range, so some requests that fit it are refused.
    excluded = [checks.positive_data_acceptance]
    with Process(shared_folder) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert len(operations) >= 10
        for operation in operations:

            @hypothesis.settings(
                max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(case=operation.as_strategy())
            def check(case):
                response = case.call(base_url=server.url)
                case.validate_response(response, excluded_checks=excluded)

            check()
        assert not [entry for entry in server.lines if "traceback" in entry]
