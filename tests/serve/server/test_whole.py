"""Whole requests are answered past the parser and ASGI, as those that come in pieces are answered by these."""

import asyncio
import contextlib
import functools
import gzip
import json
import logging
import socket
import time

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

import uvloop

from jaxembed.serve.server.inference import Inference
from jaxembed.serve.server.refusals import fields_of
from jaxembed.serve.server.whole import WholeProtocol
from tests.serve.server import fuzz
from tests.serve.server.servers import Gate, counts, memory_without_collector, on, until
from tests.serve.server.sockets import (
    answer_of,
    connect_slowly,
    one_that_runs,
    post,
    serving_bundles,
    whole_answer,
)

INFER, PREDICT = b"/v2/models/model/infer", b"/v1/models/model:predict"
V2, ROWS = json.dumps(fuzz.GOOD_V2).encode(), json.dumps(fuzz.GOOD_ROWS).encode()
run = functools.partial(on, uvloop.new_event_loop)
BAD_ID = V2.replace(b"[", b"[-5, ", 1)


def binary():
    data = dict(fuzz.GOOD_V2, parameters={"binary_data_output": True})
    body = json.dumps(data).encode()
    return post(INFER, body, b"Inference-Header-Content-Length: %d" % len(body))


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(post(INFER, V2), id="v2"),
        pytest.param(post(INFER, V2, b"Connection: keep-alive", b"Accept: */*"), id="kept"),
        pytest.param(binary(), id="binary"),
        pytest.param(post(PREDICT, ROWS), id="predict"),
        pytest.param(post(INFER, V2, b"X-Request-Timeout-Ms: 30000"), id="timeout"),
        pytest.param(post(INFER, V2, b"X-Request-Timeout-Ms: soon"), id="no-timeout"),
        pytest.param(post(INFER, V2, b"Inference-Header-Content-Length: 999999"), id="length"),
        pytest.param(post(INFER, V2, b"Inference-Header-Content-Length:  12 "), id="blanks"),
        pytest.param(
            post(INFER, V2, b"X-Request-Timeout-Ms: 30000", b"x-request-timeout-ms: soon"), id="twice"
        ),
        pytest.param(post(INFER, BAD_ID), id="bad-id"),
        pytest.param(post(INFER, b"{"), id="no-json"),
        pytest.param(post(INFER, b""), id="empty"),
        pytest.param(post(PREDICT, V2), id="another"),
    ],
)
def test_answers_are_those_to_requests_in_pieces(shared_folder, begun, sent):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers, counted = [], []
            # The second goes through the parser, on the same connection.
            for size in (len(sent), 40, len(sent)):
                for part in (sent[:size], sent[size:]):
                    writer.write(part)
                    await asyncio.sleep(0.02)
                answers.append(await whole_answer(reader))
                counted.append(counts(service))
            assert answers[0] == answers[1] == answers[2]
            assert len(begun) == 2
            assert counted[0] != counted[1]
            writer.close()

    run(check())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(INFER, gzip.compress(V2), b"Content-Encoding: gzip"), 200),
        (post(INFER + b"?x", V2), 200),
        (post(INFER.replace(b"/infer", b"/versions/7/infer"), V2), 404),
        (post(INFER, V2, b"Connection: close"), 200),
        (post(INFER, bytes(5000)), 413),
    ],
)
def test_what_is_unusual_goes_through_the_parser(shared_folder, begun, sent, status):
    async def check():
        async with serving_bundles(shared_folder, max_body_bytes=4000) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == status
            assert not begun
            writer.close()

    run(check())


@pytest.mark.parametrize("torn", [0, 1, 200])
def test_requests_without_waiting_for_answers_are_answered_in_order(shared_folder, begun, monkeypatch, torn):
    """Whatever path they take: a whole one, then some that come while it runs, and what is no HTTP at last."""
    other = post(b"/nowhere", b"abc")
    rest = other + post(PREDICT, ROWS) + other + post(PREDICT, ROWS) + b"nothing\r\n\r\n"

    async def check():
        async with one_that_runs(shared_folder, monkeypatch) as (_, _, gate, reader, writer):
            assert begun == [INFER]
            for part in (rest[:torn], rest[torn:]):
                writer.write(part)
                await asyncio.sleep(0.05)
            gate.open()
            statuses = [(await asyncio.wait_for(answer_of(reader), 20))[0] for _ in range(6)]
            assert statuses == [200, 404, 200, 404, 200, 400]
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert begun == [INFER]

    run(check())


def test_an_answer_that_cannot_be_put_together_ends_the_connection(shared_folder, begun, monkeypatch):
    def lacks(answer, fields, closes):
        raise MemoryError

    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with monkeypatch.context() as lacking:
                lacking.setattr("jaxembed.serve.server.answer.Answer.message", lacks)
                writer.write(post(INFER, V2))
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(), 20) == b""
            assert begun == [INFER]
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(INFER, V2))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            assert not service.admitted
            writer.close()

    run(check())


@pytest.mark.parametrize("route", [INFER, PREDICT, b"/predict"])
def test_the_route_of_predict_takes_it_however_it_comes(shared_folder, begun, route):
    sent = post(route, ROWS)

    async def check():
        async with serving_bundles(shared_folder, predict_route=route.decode()) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for parts in ([sent], [sent[:40], sent[40:]]):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0.05)
                status, body = await asyncio.wait_for(answer_of(reader), 20)
                assert (status, list(json.loads(body))) == (200, ["predictions"])
            assert begun == [route]
            service.shedding.limit = 0
            writer.write(sent)
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            assert counts(service) == {
                'jaxembed_requests_total{protocol="tf_rest",status="200"} 2.0',
                'jaxembed_requests_total{protocol="tf_rest",status="429"} 1.0',
            }
            writer.close()

    run(check())


def test_a_second_request_waits_for_the_answer_to_the_first(shared_folder, begun, monkeypatch):
    async def check():
        async with one_that_runs(shared_folder, monkeypatch) as (_, service, gate, reader, writer):
            writer.write(post(PREDICT, ROWS))
            await asyncio.sleep(0.05)
            assert begun == [INFER]
            assert service.admitted == 1
            gate.open()
            first, second = [(await asyncio.wait_for(answer_of(reader), 20)) for _ in range(2)]
            assert (first[0], second[0]) == (200, 200)
            assert b"outputs" in first[1]
            assert b"predictions" in second[1]
            writer.write(post(PREDICT, ROWS))
            assert (await asyncio.wait_for(answer_of(reader), 20)) == second
            assert begun == [INFER, PREDICT]

    run(check())


def test_a_client_that_leaves_gives_its_room_back(shared_folder, begun, monkeypatch):
    """Before it is begun, and while it runs; what it asked for counts as 499."""

    async def check():
        async with one_that_runs(shared_folder, monkeypatch) as (port, service, gate, _, gone):
            gone.transport.abort()
            assert await until(lambda: not service.admitted)
            gate.open()
            assert await until(lambda: any('status="499"' in line for line in counts(service)))
            for _ in range(5):  # it may be gone in the turn that reads its request
                client = socket.create_connection(("127.0.0.1", port))
                client.sendall(post(INFER, V2))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                await asyncio.sleep(0.02)
            assert await until(lambda: not service.admitted and not service.shedding.under_way)
            assert not service._rooms
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(INFER, V2))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            writer.close()

    run(check())


def test_a_client_that_sends_no_more_gets_its_answer(shared_folder, begun):
    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(INFER, V2))
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 20)
            assert answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 200 ")
            assert begun == [INFER]
            writer.close()

    run(check())


@pytest.mark.parametrize("when", ["leaving", "shutdown"])
def test_the_last_answer_of_a_connection_says_so(shared_folder, begun, monkeypatch, when):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            service.batcher._seconds.clear()
            connections = set()
            made = WholeProtocol._begin_whole

            def begin_whole(self, *arguments):
                connections.add(self)
                made(self, *arguments)

            monkeypatch.setattr(WholeProtocol, "_begin_whole", begin_whole)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            service.leaving = when == "leaving"
            writer.write(post(INFER, V2))
            assert await until(gate.running.is_set)
            if when == "shutdown":
                for connection in connections:
                    connection.shutdown()
            gate.open()
            lines, _ = await whole_answer(reader)
            assert lines[0] == b"HTTP/1.1 200 OK"
            assert lines.count(b"connection: close") == 1
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()

    run(check())


def test_a_mistake_of_ours_is_an_error_and_the_end_of_the_connection(shared_folder, begun, monkeypatch, caplog):
    async def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(Inference, "_infer", broken)

    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with caplog.at_level(logging.ERROR, "uvicorn.error"):
                writer.write(post(INFER, V2))
                lines, body = await whole_answer(reader)
            assert (lines[0], body) == (b"HTTP/1.1 500 Internal Server Error", b"Internal Server Error")
            assert b"connection: close" in lines
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert service.admitted == service.shedding.under_way == len(service._rooms) == 0
            assert any('status="500"' in line for line in counts(service))
            writer.close()
        assert any("ZeroDivisionError" in str(record.exc_info) for record in caplog.records)

    run(check())


def test_a_client_that_reads_no_answers_is_not_answered_for_ever(shared_folder, begun, monkeypatch):
    """Its answers wait for it, and no more than one beyond what the system holds."""
    write = Inference._write

    async def long(self, outputs, *arguments):
        head, parts = await write(self, outputs, *arguments)
        return head, [*parts, bytes(1 << 20)]

    monkeypatch.setattr(Inference, "_write", long)

    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            client = await connect_slowly(port, post(INFER, V2))
            loop = asyncio.get_running_loop()
            assert await until(lambda: begun == [INFER])
            for _ in range(30):
                await loop.sock_sendall(client, post(INFER, V2))
                await asyncio.sleep(0.01)
            assert len(begun) < 15
            client.close()
            assert await until(lambda: not service.admitted)

    run(check())


def test_a_connection_is_idle_once_it_is_answered_and_not_before(shared_folder, begun, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder, idle_timeout=0.4) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            service.batcher._seconds.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.2)
            writer.write(post(INFER, V2))
            await asyncio.sleep(0.9)
            gate.open()
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            began = time.monotonic()
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert time.monotonic() - began > 0.3
            assert begun == [INFER]
            writer.close()

    run(check())


def test_blank_lines_between_requests_never_add_up(shared_folder, begun, monkeypatch):
    monkeypatch.setattr("jaxembed.serve.server.pipelining.MAX_HEAD_BYTES", 100)

    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(60):
                writer.write(post(INFER, V2))
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
                writer.write(b"\r\n")
                await asyncio.sleep(0.002)
            assert len(begun) > 50
            writer.close()

    run(check())


@pytest.mark.parametrize(
    ("size", "fields", "status"),
    [
        (300_000, [b"X-Request-Timeout-Ms: 0.001"], 504),  # it was refused by who waited for a batch
        (600_000, [], 400),  # by who waited for the process that reads large ones
        (600_000, [], 503),  # there was no memory for it
    ],
)
def test_bodies_of_refused_requests_are_let_go(shared_folder, monkeypatch, size, fields, status):
    """At once, and not when cycles are looked for."""

    def lacks(reader, body, header):
        raise MemoryError

    if status == 503:
        monkeypatch.setattr("jaxembed.serve.server.v2_binary.read_natively", lacks)
    body = json.dumps({**fuzz.GOOD_V2, "parameters": {"x": "y" * size}}).encode()
    sent = post(INFER, body if status == 504 else body.replace(b"[", b"[-5, ", 1), *fields)

    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            held = []
            for _ in range(40):
                writer.write(sent)
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == status
                held.append(taken())
            assert max(held) - held[3] < 10 * len(sent)
            writer.close()

    with memory_without_collector() as taken:
        run(check())


def test_only_fields_that_are_read_are_remembered(shared_folder, begun):
    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(INFER, V2, b"X-Request-Timeout-Ms: 30000", *[b"X%d: y" % i for i in range(100)]))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            writer.close()

    heads = []
    remember = WholeProtocol._remember

    def remembering(self, head):
        heads.append(remember(self, head))
        return heads[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeProtocol, "_remember", remembering)
        run(check())
    assert [head.fields for head in heads] == [{"x-request-timeout-ms": "30000"}]


def test_fields_of_a_head():
    head = b"POST /x HTTP/1.1\r\nA: b\r\na: c\r\nX-Y:  d e \r\nE: \r\nContent-Length: 3\r\n\r\n"
    assert fields_of(head) == {"a": "b", "x-y": "d e ", "e": "", "content-length": "3"}
